"""Fields of a continual-learning config, with the recipe's defaults. The only home of a default."""

import ml_collections
from ml_collections import config_dict

from configs import common


def continual_config() -> ml_collections.ConfigDict:
  """Every field; epochs are of one task."""
  return ml_collections.ConfigDict(
    {
      "experiment": "continual",
      "seed": 0,
      "data": {
        "name": "digits",  # or any TFDS image-classification set
        "data_dir": config_dict.placeholder(str),  # None: ~/tensorflow_datasets
        "train_split": "train",
        "test_split": "test",
        "image_feature": config_dict.placeholder(str),  # of TFDS; None: image
        "label_feature": config_dict.placeholder(str),  # of TFDS; None: label
        "image_size": 0,  # images are resized to this; 0: as they are
        "mean": (0.5,),
        "std": (0.5,),
        "pad": 0,  # random crop: largest shift in pixels
        "flip": False,
      },
      "tasks": {
        "classes_per_task": 2,
        "count": 0,  # 0: as many as the classes make
        "order_seed": config_dict.placeholder(int),  # of the order of classes; None: their own
        "validation": 0.1,  # share of the training images held out
      },
      "model": {
        "name": "simple_cnn",  # or vgg8, vgg16, resnet18 and the like
        "width": 1.0,
        "norm": True,  # BatchNorm after each convolution of a chain; the paper's SimpleCNN may have none
        "dtype": "float32",  # or bfloat16
        "gate": {"hidden": 16, "initial_open": 0.85, "temperature": 2 / 3, "noise_scale": 1.0},
      },
      "method": "gates",
      "gates": {  # of multitask_gates the first three
        "sparsity": 0.5,
        "patience": 20.0,  # epochs
        "threshold": 0.0,
        "when_full": "error",  # where a layer has no unit left for the next task; or grow, or reuse
        "growth": 0.25,  # of grow: how many units are added, as a share of those at the start
        "protect_updates": True,
        "shut_gates": True,
        "own_norms": True,
      },
      "hat": {
        "steepness": 400.0,  # s_max, the slope of the masks in evaluation
        "sparsity": 0.75,  # c, the price of the share of free units that a task takes
      },
      "progressive": {
        "alpha": 0.1,  # weight of an older column's features to begin with
      },
      "router": {  # the classifier of tasks, for when the task is unknown
        "rehearsal": "episodic",  # or generative, gated_generative, masked_generative, none
        "network": False,  # an ungated one of all classes, in place of a layer on all streams' features
        "distillation": 2.0,  # how much that network teaches the stream of the task being learnt
        "hidden": 64,  # of the layer, as all below
        "steps": 2000,  # after each task, by itself
        "batch_size": 256,
        "learning_rate": 1e-3,
      },
      "generator": {  # of generative rehearsal: a conditional WGAN-GP for each task, or for all, trained before a task
        "steps": 1500,  # of the generator
        "batch_size": 64,  # over all devices, for each update
        "critic_steps": 2,  # updates of the critic for each of the generator
        "penalty": 10.0,
        "learning_rate": 5e-4,
        "average": 0.99,  # decay of the moving average of parameters that is sampled
        "latent": 64,
        "width": 16,  # channels of its last hidden map
        "images": 2000,  # generated of each task to train the classifier of tasks
        "gates": {  # of gated_generative, one generator for all tasks; as of gates and model.gate
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
      },
      "online_ewc": {
        "strength": 200.0,
        "decay": 1.0,  # of the Fisher diagonal of earlier tasks, in [0, 1]
        "examples": 500,
      },
      "si": {
        "strength": 10.0,  # c, without 1/2
        "damping": 0.1,  # xi, a squared change of a parameter
      },
      "lwf": {
        "weight": 1.0,  # of each old head
        "temperature": 2.0,
      },
      "replay": {  # the episodic memory, of every method that has one
        "images": 2000,
        "batch_size": 64,  # images replayed at each step, over all devices; of generators as well
      },
      "derpp": {
        "alpha": 0.5,  # weight of the squared distance to stored logits
        "beta": 2.0,  # weight of the cross-entropy of replayed images
      },
      "dgm": {  # its generator is that of generative rehearsal, with masks
        "steepness": 400.0,  # as of hat
        "sparsity": 0.75,
        "real": 0.0,  # share of the loss on real images, which are the task's alone
      },
      "optim": {
        "epochs": 10,  # of the smallest task; every task has as many steps
        "batch_size": 64,  # over all devices; of each task, where all are learnt together
        "eval_batch_size": 256,
        "learning_rate": 0.01,
        "gate_multiplier": 1.0,  # of the learning rate, for the parameters of gates, but for hat
        "schedule": "step",  # or cosine, over the steps of a task
        "drops": (),
        "drop_factor": 0.1,
        "warmup": 0.0,
        "momentum": 0.9,
        "weight_decay": 5e-4,  # 0 for gate parameters whatever stands here
        "clip": 1.0,  # largest norm of the gradient
      },
      "devices": {"backend": "pmap"},  # or shard_map
      "log_every": 50,  # steps
      "checkpoint_every": 500,  # steps; and at the end of each task
    }
  )


_VARIANTS = {
  "method": ("method", str),
  "model": ("model.name", str),
  "width": ("model.width", float),
  "epochs": ("optim.epochs", int),
  "batch": ("optim.batch_size", int),
  "lr": ("optim.learning_rate", float),
  "sparsity": ("gates.sparsity", float),
  "patience": ("gates.patience", float),
  "noise": ("model.gate.noise_scale", float),
  "rehearsal": ("router.rehearsal", str),
  "seed": ("seed", int),
}


def apply_variants(config: ml_collections.ConfigDict, arg: str | None) -> ml_collections.ConfigDict:
  """`method=ewc,epochs=3` and the like."""
  return common.apply_variants(config, arg, _VARIANTS)
