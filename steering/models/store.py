"""Published model versions on disk: safetensors for the weights, JSON for their description.

A version is a folder that is written whole under a temporary name and then renamed; the pointer to the newest one is
replaced in the same manner. A reader sees a whole version or none, and reading executes no code from a file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from steering.files import own_file, read_json
from steering.models.networks import OWN, Network, build_network, find_network
from steering.records import ModelVersion
from steering.records.whole_file import sync_folder, write_whole


class ModelStore:
    """The versions under one folder; any number of readers, one writer.

    A reader outside, such as another inference service, may rely on this, and needs no steering for it. `newest.json`
    is there from the first version on, and holds an object with the integer `number`: the version in service, which may
    be an older one than before, after a return to it. It is replaced as a whole: nobody finds it empty or cut. The
    folder of that version, its number in five digits or more, holds `weights.safetensors` (tensors by the name of the
    parameter) and `model.json` (the fields of ModelVersion). Both are whole, and on the disk itself, before
    `newest.json` names the version, and neither ever changes. Only a version that `newest.json` names no more is
    withdrawn, and its number may be given again: who finds it gone reads `newest.json` again. All this holds while a
    run goes on, after its end, after a reset of the machine, and after a recovery.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def publish(self, network: Network, version: ModelVersion) -> Path:
        """Write the network's weights and optics as `version`, and make it the newest. Returns its folder. A version
        that has its name is on the disk itself: a reset of the machine leaves the whole of it, or nothing.

        Raises FileExistsError for a version that exists already: a version is never changed. Raises ValueError for one
        that describes another network than this one, OSError, with the system's number, where it cannot be written.
        """
        if (type(network).__name__, network.hyperparameters) != (version.network, version.hyperparameters):
            raise ValueError(
                f"found a {type(network).__name__} with {network.hyperparameters} to publish as {version.network} with "
                f"{version.hyperparameters}, expected both alike"
            )
        final = self.folder(version.number)
        if final.exists():
            raise FileExistsError(
                f"found model version {version.number} in {self.path}, expected a number not yet used"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        draft = self.path / f".{final.name}.{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            # By bytes: where its own writer finds the disk full, the number of the system's error is lost.
            weights = save({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()})
            write_whole(draft / "weights.safetensors", weights, durable=True)
            write_whole(draft / "model.json", json.dumps(_finite(asdict(version)), indent=1).encode(), durable=True)
            draft.rename(final)
            sync_folder(self.path)
        except OSError as error:
            raise OSError(
                error.errno,  # it says whether to try again
                f"{final}: the model version could not be written ({error.strerror}), expected space and permission to "
                "write: free some space, or choose another folder with --out",
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self.point_to(version.number)
        return final

    def withdraw(self, number: int, served: int) -> None:
        """Delete a version that was never in service: its number is free again, and `served` is the newest.

        A reader that has begun to read it may find it incomplete. Where an earlier call has deleted it, in part or as a
        whole, this one does what is left.
        """
        self.point_to(served)
        gone = self.path / f".{self.folder(number).name}.withdrawn"
        if self.folder(number).exists():
            self.folder(number).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def newest(self) -> int | None:
        """Number of the newest version, or of an older one that `point_to` has named; None before the first."""
        pointer = self.path / "newest.json"
        if not pointer.exists():
            return None
        found = read_json(pointer, root=self.path)
        if not isinstance(found.get("number"), int) or isinstance(found["number"], bool):
            raise ValueError(f"found {str(found)[:200]} in {pointer}, expected the number of the newest version")
        return int(found["number"])

    def numbers(self) -> list[int]:
        """Of every version, in order; nothing of them is read."""
        return sorted(int(p.name) for p in self.path.glob("[0-9]*") if p.name.isdecimal() and p.is_dir())

    def versions(self) -> list[ModelVersion]:
        """Every version, oldest first. Raises as `describe` does."""
        return [self.describe(n) for n in self.numbers()]

    def describe(self, number: int) -> ModelVersion:
        """The description of a version.

        Raises FileNotFoundError for a number that is not there, ValueError for a file that is damaged or not ours.
        """
        path = self._file(number, "model.json")
        return self.description(read_json(path, root=self.path), path)

    @staticmethod
    def description(found: dict[str, Any], path: Path) -> ModelVersion:
        """A version from the content of its description at this path. Raises ValueError for what is none."""
        if "dials" in found:  # the key of versions that were written before 0.1.0
            found["hyperparameters"] = found.pop("dials")
        known = {f.name for f in fields(ModelVersion)}
        try:
            if known - set(found):
                raise KeyError(*sorted(known - set(found)))
            for name, kind in {"network": str, "hyperparameters": dict, "number": int, "trained_on": dict}.items():
                if not isinstance(found[name], kind):
                    raise TypeError(f"{name} is a {type(found[name]).__name__}")
            whole: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
            return ModelVersion(**whole)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"found the fields {sorted(found)[:50]} in {path} ({error}), expected those of {sorted(known)}"
            ) from error

    def weights(self, number: int) -> dict[str, Tensor]:
        """Weights and optics of a version, by name. Raises as `describe` does."""
        path = self._file(number, "weights.safetensors")
        try:
            return load_file(path)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"found {path} damaged or of another format ({error}), expected safetensors") from error

    def load(self, number: int, *, network: type[Network] | None = None) -> Network:
        """A network with the weights and the optics of a version, on the CPU, ready to predict.

        network: its class; None: the one of ours that the version names. A class is never imported by a name
        in a file. Raises as `describe` does, and ValueError for a network that is not ours where no class is
        given, for a class of another name, and for weights that do not fit.
        """
        version = self.describe(number)
        kind = find_network(version.network) if network is None else network
        if kind.__name__ != version.network:
            raise ValueError(
                f"found version {number} of a {version.network} in {self.path}, expected a {kind.__name__}: supply the "
                "class that was published"
            )
        self._refuse_other_size(number, kind, version)
        built = build_network(kind, version.hyperparameters)
        try:
            built.load_state_dict(self.weights(number))
        except RuntimeError as error:
            raise ValueError(
                f"found weights in {self.folder(number)} that do not fit {version.network} with "
                f"{version.hyperparameters}, expected those it was published with"
            ) from error
        loaded: Network = built.eval()
        return loaded

    def _refuse_other_size(self, number: int, kind: type[Network], version: ModelVersion) -> None:
        """Refuse a version whose weights are not those of its network, before memory is taken for either."""
        path = self._file(number, "weights.safetensors")
        try:
            with safe_open(path, "pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        except SafetensorError as error:
            raise ValueError(f"found {path} damaged or of another format ({error}), expected safetensors") from error
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                wanted = {
                    k: tuple(v.shape) for k, v in build_network(kind, version.hyperparameters).state_dict().items()
                }
        except (RuntimeError, NotImplementedError, OverflowError) as error:
            if kind not in OWN:  # a class of the caller's may need real values: what it is built with is checked later
                return
            raise ValueError(
                f"found hyperparameters {dict(version.hyperparameters)} in {self.folder(number)}, expected some that "
                f"{kind.__name__} can be built with ({error})"
            ) from error
        if found != wanted:
            other = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            raise ValueError(
                f"found weights in {self.folder(number)} that do not fit {version.network} with "
                f"{dict(version.hyperparameters)} (first {other[0]}), expected those it was published with"
            )

    def folder(self, number: int) -> Path:
        """The folder of a version, whether it is there or not."""
        return self.path / f"{number:05d}"

    def _file(self, number: int, name: str) -> Path:
        path = self.folder(number) / name
        if not path.exists():
            raise FileNotFoundError(f"found no {name} of model version {number} in {self.path}, expected it published")
        own_file(path, self.path)
        return path

    def point_to(self, number: int) -> None:
        """Make a version the one that `newest` returns, and that a predictor which starts now serves.

        Raises FileNotFoundError for a number that is not there.
        """
        self._file(number, "model.json")
        write_whole(self.path / "newest.json", json.dumps({"number": number}).encode(), durable=True)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Values that are not finite, which JSON does not have, become None: not known."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
