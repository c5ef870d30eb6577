"""Fields of a continual-learning config, with the recipe's defaults.

No default is defined anywhere else.
"""

import ml_collections
from ml_collections import config_dict

from configs import common
from gating_jax.config_files import Config


def continual_config() -> Config:
  """Returns a config with every field; epochs are those of one task."""
  return ml_collections.ConfigDict(
    {
      "experiment": "continual",
      "seed": 0,
      "data": {
        "name": "digits",  # or folder, or any TFDS image-classification set
        "data_dir": config_dict.placeholder(str),  # None: ~/tensorflow_datasets
        "train_split": "train",
        "test_split": "test",
        "image_feature": config_dict.placeholder(str),  # of TFDS; None: image
        "label_feature": config_dict.placeholder(str),  # of TFDS; None: label
        "image_size": 0,  # images are resized to this; 0: as they are
        "mean": (0.5,),
        "std": (0.5,),
        "crop_padding": 0,  # random crop: largest shift in pixels
        "flip": False,
      },
      "tasks": {
        "classes_per_task": 2,
        "count": 0,  # 0: as many as the classes make
        # numbers of the classes of each task, ((0, 1), (2, 3, 4)), which need not be as many; None:
        # all classes in turn
        "classes": config_dict.placeholder(tuple),
        "order_seed": config_dict.placeholder(int),  # shuffles the classes; None: their own order
        "validation": 0.1,  # fraction of the training images that is held out
      },
      "model": {
        "name": "simple_cnn",  # or vgg8, vgg16, resnet18 and the like
        "width": 1.0,
        # BatchNorm after each convolution of a chain; the paper's SimpleCNN may have none
        "norm": True,
        "dtype": "float32",  # or bfloat16
        "gate": {
          "hidden": 16,
          "initial_open": 0.85,
          "temperature": 2 / 3,
          "noise_scale": 1.0,
          # sums of pooled, moments, grid, glance; None: pooled
          "context": config_dict.placeholder(str),
          **common.opening(),
        },
      },
      "method": "gates",
      "gates": {  # multitask_gates uses the first three
        "sparsity": 0.5,
        "patience": 20.0,  # epochs
        "threshold": 0.0,
        "when_full": "error",  # if a layer has no unit left for the next task; or grow, or reuse
        "growth": 0.25,  # of grow: units to add, as a fraction of those at the start
        "protect_updates": True,
        "shut_gates": True,
        "own_norms": True,
      },
      "hat": {
        "steepness": 400.0,  # s_max, the slope of the masks in evaluation
        "sparsity": 0.75,  # c, penalty on the fraction of free units that a task takes
        # its authors': large, since the compensation makes the embeddings' gradients large;
        # here and below, None is optim.grad_clip_norm
        "grad_clip_norm": 10_000.0,
      },
      "progressive": {
        "alpha": 0.1,  # initial weight of an older column's features
        "grad_clip_norm": config_dict.placeholder(float),  # its authors do not state any
      },
      "router": {  # task inference, for when the task is unknown
        "rehearsal": "episodic",  # or generative, gated_generative, masked_generative, none
        # an ungated network of all classes, in place of a layer on the features of all tasks
        "network": False,
        "distillation": 2.0,  # weight of that network's teaching for the task being learnt
        "hidden": 64,  # of the layer, as all below
        "steps": 2000,  # after each task, on its own
        "batch_size": 256,
        "learning_rate": 1e-3,
      },
      # of generative rehearsal: a conditional WGAN-GP, per task or for all, trained before a task
      "generator": {
        "steps": 1500,  # of the generator
        "batch_size": 64,  # over all devices, for each update
        "critic_steps": 2,  # updates of the critic for each of the generator
        "penalty": 10.0,
        "learning_rate": 5e-4,
        "ema_decay": 0.99,  # decay of the moving average of parameters that is sampled
        "latent": 64,
        "width": 16,  # channels of its last hidden map
        "images": 2000,  # generated for each task, to train the task classifier
        "gates": {  # of gated_generative, one generator for all tasks; see gates and model.gate
          "initial_open": 0.5,
          "noise_scale": 0.25,
          "sparsity": 1.0,
          "patience": 500.0,  # steps
          "threshold": 0.0,
          "protect_updates": True,
          "shut_gates": True,
        },
      },
      "ewc": {
        "strength": 200.0,  # lambda of lambda/2; less at a larger learning rate
        "examples": 500,  # images of a task for its Fisher diagonal, at most
        "grad_clip_norm": config_dict.placeholder(float),  # its authors do not state any
      },
      "online_ewc": {
        "strength": 200.0,
        "decay": 1.0,  # of the Fisher diagonal of earlier tasks, in [0, 1]
        "examples": 500,
        "grad_clip_norm": config_dict.placeholder(float),  # its authors do not state any
      },
      "si": {
        "strength": 10.0,  # c, without 1/2
        "damping": 0.1,  # xi, in units of a squared change of a parameter
        "grad_clip_norm": config_dict.placeholder(float),  # its authors do not clip
      },
      "lwf": {
        "weight": 1.0,  # of each old head
        "temperature": 2.0,
        "grad_clip_norm": config_dict.placeholder(float),  # its authors do not state any
      },
      "replay": {  # the replay memory, of every method that has one
        "images": 2000,
        "batch_size": 64,  # images replayed at each step, over all devices; also for generators
        # of er, agem and icarl, whose authors do not clip
        "grad_clip_norm": config_dict.placeholder(float),
      },
      "derpp": {
        "alpha": 0.5,  # weight of the squared distance to stored logits
        "beta": 2.0,  # weight of the cross-entropy of replayed images
        "grad_clip_norm": config_dict.placeholder(float),  # its authors do not clip
      },
      "dgm": {  # its generator is that of generative rehearsal, with masks
        "steepness": 400.0,  # as for hat
        "sparsity": 0.75,
        "real_weight": 0.0,  # weight of the loss on real images, which are those of the task alone
      },
      "optim": {
        "epochs": 10,  # of the smallest task; every task has as many steps
        # of every task, in place of epochs: where one task is tiny, the others would starve
        "steps_per_task": config_dict.placeholder(int),
        "batch_size": 64,  # over all devices; for each task, where all are learnt together
        "eval_batch_size": 256,
        "learning_rate": 0.01,
        "gate_lr_multiplier": 1.0,  # factor of the learning rate of gate parameters; ignored by hat
        "schedule": "step",  # or cosine, over the steps of a task
        "lr_drop_at": (),
        "drop_factor": 0.1,
        "warmup": 0.0,
        "momentum": 0.9,
        "weight_decay": 5e-4,  # always 0 for gate parameters
        # largest norm of the gradient, for methods whose own section has None or no such field
        "grad_clip_norm": 1.0,
      },
      "devices": {"backend": "pmap"},  # or shard_map
      # epochs between tests on the task's validation images; the best state then ends the task.
      # None: the last state does. A test costs as much as the end of a task
      "eval_every": config_dict.placeholder(float),
      "log_every": 50,  # steps
      "checkpoint_every": 500,  # steps; and at the end of each task
    }
  )


_VARIANTS = {
  "method": common.setting("method"),
  "model": common.setting("model.name"),
  "width": common.setting("model.width", float),
  "epochs": common.setting("optim.epochs", int),
  "batch": common.setting("optim.batch_size", int),
  "lr": common.setting("optim.learning_rate", float),
  "sparsity": common.setting("gates.sparsity", float),
  "patience": common.setting("gates.patience", float),
  "noise": common.setting("model.gate.noise_scale", float),
  "rehearsal": common.setting("router.rehearsal"),
  "seed": common.setting("seed", int),
}


def apply_variants(config: Config, arg: str | None) -> Config:
  """Applies variants such as `method=ewc,epochs=3`; see `common.apply_variants`."""
  return common.apply_variants(config, arg, _VARIANTS)
