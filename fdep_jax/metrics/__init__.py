"""HSE and the conventional metrics, for anybody's probability maps (paper §3.4).

Needs numpy and scipy only; `jitted` (the same counts on a GPU or TPU) is imported where it is used.
"""

from fdep_jax.metrics import hse as hse
