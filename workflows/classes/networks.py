"""The network of a training of classes: one of ours, or a function of the user's."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch import nn

from steering import ResNet18, ResNet50

Make = Callable[[int], nn.Module]
"""A network for so many classes."""
OWN = {"resnet18": ResNet18, "resnet50": ResNet50}


def maker(name: str, *, width: int, size: int) -> Make:
    """What makes the network, on any rank.

    name: resnet18, resnet50, or module:function, where function(classes) gives a torch module that turns images float
    (n, 3, y, x) into logits (n, classes). The module is installed where the ranks are, or a file of the present
    folder, which then travels to them. width, size: of the own ones; from 64 pixels on they have the ImageNet stem.
    """
    if name in OWN:
        return partial(OWN[name], width=width, stem="imagenet" if size >= 64 else "cifar")
    module_name, colon, function = name.partition(":")
    if not (colon and module_name and function):
        raise ValueError(f"found --network {name}, expected resnet18, resnet50 or module:function")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"found --network {name} and {error}, expected a module that is installed or a file of {os.getcwd()}"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"found --network {name} and no function {function} in {module.__file__}, expected one")
    file = Path(module.__file__ or "")
    if file.is_relative_to(Path.cwd()) and "site-packages" not in file.parts:
        cloudpickle.register_pickle_by_value(module)
        try:
            return Sent(cloudpickle.dumps(make))
        finally:
            cloudpickle.unregister_pickle_by_value(module)
    return make


@dataclass(frozen=True)
class Sent:
    """A function of a file that the ranks need not see."""

    pickled: bytes

    def __call__(self, classes: int) -> nn.Module:
        """The network."""
        return cloudpickle.loads(self.pickled)(classes)


def checked(network: Any, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """The network. Raises ValueError where it gives no logits (n, classes) for images of this shape."""
    if not isinstance(network, nn.Module):
        raise ValueError(f"found a {type(network).__name__} as the network, expected a torch module")
    training = network.training
    network.eval()
    with torch.no_grad():
        logits = network(torch.zeros(2, *shape))
    network.train(training)
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != (2, classes):
        raise ValueError(f"found outputs {found} of the network for 2 images, expected logits (2, {classes})")
    return network
