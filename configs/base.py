"""Every setting, once. The other configs are this and a few lines.

The defaults are the paper's (§4.2). If it is silent, they are the released recipe of
YuChuang1205/PAL, on which its experiments build. A default from neither is marked OUR CHOICE.
"""

from ml_collections import ConfigDict


def get_config():
  """A flat list of the settings."""
  c = ConfigDict()
  c.seed = 0
  # original | fdep_wo_coisd | fdep: which branches are trained; classical: none, a method without
  # training in place of the network
  c.mode = "fdep"
  c.host_devices = 1  # devices that a CPU is split into; 1 elsewhere
  # Joins several processes: auto (TPU pods, SLURM, Open MPI), or HOST:PORT,COUNT,INDEX
  c.distributed = "off"
  c.profile_steps = ""  # "10-12": writes a trace of these steps to workdir/profile

  c.model = ConfigDict()
  c.model.backbone = "msda"  # a file name of fdep_jax/backbones, or of fdep_jax/classical
  c.model.fusion = "samf"  # samf | add (Tab. 3)
  c.model.bn_stats = "per_branch"  # per_branch | shared, running statistics. OUR CHOICE
  # > 0: weight of the old running statistics in every BatchNorm; 0: that of the published network,
  # which in ACM and ALCNet is mostly 0.1 (fdep_jax/layers/blocks.py). OUR CHOICE for short
  # trainings of these: 0.9, as in their original.
  c.model.bn_momentum = 0.0
  c.model.share = "both"  # both | encoder | decoder: what the branches share (Tab. 5)
  # > 0: the probability of a target that the heads start with, by their last biases; 0: biases as
  # drawn, about 0.5. From there ACM's decoder can die on its way to "nothing is a target", which
  # most pixels ask for (results/README.md). OUR CHOICE for short trainings: 0.01.
  c.model.start_prob = 0.0
  # no | plain | msda: such a decoder right on DINOv2's levels, instead of the network (Tab. 6)
  c.model.on_dino = "no"

  c.data = ConfigDict()
  c.data.root = "data/SIRST3"  # folder, "tfds:<builder>", or "synthetic"
  # What becomes black to white in images of more than 8 bits: LOW,HIGH in the unit of the files;
  # full, the range of their type; auto, measured on the train images once; "": 8 bits only.
  c.data.range = ""
  c.data.crop = 448  # pixels; paper §4.2. 448 = 32·14, so that DINOv2 tiles it exactly
  c.data.augment = "recipe"  # recipe | dihedral | none
  c.data.target_crop_prob = 0.0  # share of crops placed on a target; PAL places none
  # Pixels of zeros beyond the right and bottom border that a crop may reach into; PAL: 0. A crop
  # smaller than the images never shows the seam to the zeros that evaluation pads with, and a
  # network that has not seen it finds false targets along it. OUR CHOICE for small crops: 32.
  c.data.crop_margin = 0
  c.data.val_fraction = 0.1  # of the train split, held out if select_on is val. OUR CHOICE
  # > 0: trains on so many of the train images, drawn by the seed, as with few frames of one's own;
  # a greater number has those of a smaller one, too. 0: on all.
  c.data.train_images = 0
  c.data.threads = 2  # that read and augment
  # Keeps the decoded train images in the memory of each device, two bytes a pixel, and cuts and
  # augments their crops there: the same batches, faster.
  c.data.on_device = False
  # Decodes images each time they are needed, for sets larger than the memory: the same batches.
  c.data.lazy = False
  c.data.synthetic_size = 128  # pixels; root "synthetic" only
  c.data.synthetic_train = 400  # scenes
  c.data.synthetic_test = 60  # scenes

  c.prior = ConfigDict()
  c.prior.checkpoint = "weights/dinov2_vitl14_pretrain.pth"  # or "random" (quick start only)
  # model | imagenet | satellite: mean and deviation of its input; model: what its kind has. Weights
  # of DINOv3 that saw satellite images need satellite, and their file does not say so.
  c.prior.normalisation = "model"
  c.prior.levels = ()  # 0-based blocks; () for the quarter depths, ViT-L: 5, 11, 17, 23
  c.prior.dtype = "float32"  # of its matrix products; bfloat16 on accelerators
  c.prior.unfreeze = False  # train it, too (Tab. 6); with mode fdep_wo_coisd
  c.prior.shard = False  # share its weights out among the devices: less memory, more traffic
  # K > 0: training draws from K crops of each image, whose levels are computed once
  # (fdep_jax/priors/bank.py). 0: draws new crops at every step, the paper's recipe.
  c.prior.bank = 0
  c.prior.bank_refresh_epochs = 0.0  # epochs after which the crops are drawn anew; 0: never
  c.prior.bank_folder = ""  # default workdir/bank; runs of one data, seed and prior may share it

  c.dino = c.prior  # the section's old name: one section under two names

  c.loss = ConfigDict()
  c.loss.light_weight = 1.0  # λ of L_main + λ·L_light, paper §3.3
  c.loss.distill_weight = 0.0  # of an explicit distillation of the light branch (Tab. 5)
  c.loss.edge_mode = "intended"  # intended | released, see fdep_jax/losses.py

  c.train = ConfigDict()
  c.train.batch_size = 16  # global; paper §4.2
  c.train.epochs = 400  # paper §4.2
  c.train.steps = 0  # if > 0, wins over epochs
  c.train.learning_rate = 1e-3  # AdamW; PAL (the paper's value is lost in its text)
  c.train.weight_decay = 0.01  # on all parameters, norms and biases included; PyTorch's default
  # Any optax schedule. In its arguments "learning_rate" stands for the number above, "steps" for
  # the length of the run. PAL's rate is constant.
  c.train.schedule = "constant_schedule"
  c.train.schedule_args = ConfigDict({"value": "learning_rate"}, type_safe=False)
  # Weights to start from: zoo:NAME, a run's folder, a light.safetensors, or a published file of
  # this network; "": initial values drawn from the seed (fdep_jax/start.py).
  c.train.init_from = ""
  c.train.labels = "true"  # true | pseudo | both: masks of the train images (appendix D)
  c.train.teacher = ""  # the finished run whose selected main branch makes the pseudo-labels
  c.train.nonfinite = "stop"  # stop | skip (and count): a step that is not finite
  # Of activations; parameters, statistics and losses stay float32. OUR CHOICE; PAL: also float16.
  c.train.dtype = "float32"
  # none | products: what the backward pass computes again to save memory; fdep_jax/step.py: REMAT
  c.train.remat = "none"
  # Steps that one call on the devices computes. More than 1 saves the host's time between short
  # steps; it has to divide log.every_steps, or steps up to the next log are taken one by one.
  c.train.steps_per_dispatch = 1

  c.eval = ConfigDict()
  c.eval.every_epochs = 1.0  # how often the held-out images are scored during training
  # Least number of steps between two such evaluations: an epoch of a small set is a few steps.
  # OUR CHOICE.
  c.eval.least_steps = 20
  # val | test: what the best checkpoint is chosen on. PAL: test, which shows it the answers.
  c.eval.select_on = "val"
  # hse | iou: the deployed branch's score that chooses it. PAL: iou. OUR CHOICE: the paper's metric
  c.eval.select_by = "hse"
  # all | deployed: branches that are scored. Of both, the light one is deployed and needs no prior,
  # so that its evaluations take a fraction of the time.
  c.eval.branches = "all"
  c.eval.batch_size = 16  # most images evaluated at once
  c.eval.save_probs = False  # write the probability maps to workdir/probs

  c.checkpoint = ConfigDict()
  c.checkpoint.every_steps = 500
  c.checkpoint.keep = 2  # newest ones; the best is kept beside them

  c.log = ConfigDict()
  c.log.every_steps = 10
  c.log.tensorboard = True
  c.log.progress = True  # progress bar
  c.log.compile_cache = "~/.cache/fdep_jax"  # compiled programs for the next run; "" for none
  return c
