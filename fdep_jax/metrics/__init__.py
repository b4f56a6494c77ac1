"""HSE and the conventional metrics for any detector's probability maps (paper §3.4).

Needs numpy and scipy only. `jitted`, the same counts on a GPU or TPU, needs jax; import it by name.
"""

from fdep_jax.metrics import hse as hse
