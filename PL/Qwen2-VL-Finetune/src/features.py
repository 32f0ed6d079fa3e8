"""What a frozen vision tower makes of images, worked out once and kept in their place (`--cache_features`).

A change of method where vision is trained otherwise, as in the paper; where it is frozen anyway, only time is saved.
"""

import hashlib
import os

import param_groups
import process_group
import torch
from cache import Cache
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data import OF_TEXT, DataError, Look, Samples

LEVEL = "deepstack_{}"  # what Qwen3-VL adds to its first layers


class Features:
    """Takes an encoded sample's images to what the language model is given of them, and a batch of that to its model."""

    def __init__(self, model: torch.nn.Module, device: torch.device, dtype: torch.dtype, blank: dict):
        """`blank` is any encoded sample with an image: it tells the form in which this family's tower answers."""
        self.weights = hashlib.sha256()
        for name, weight in model.named_parameters():
            if param_groups.part_of(name, model.config.model_type) != "language":
                self.weights.update(weight.detach().cpu().numpy())
        for name in param_groups.modules_of(
            {"vision", "merger"}, model
        ):  # the rest may be too large for the device as it is
            model.get_submodule(name).to(device)
        self.model = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
        self.device, self.dtype = device, dtype
        answer = self._answer(blank).pooler_output
        self.form = answer.shape[1:] if torch.is_tensor(answer) else None

    def of(self, encoded: dict) -> dict:
        """The sample with `features` [visual tokens, H] for its images."""
        answer = self._answer(encoded)
        levels = getattr(answer, "deepstack_features", None) or []
        kept = {name: value for name, value in encoded.items() if name in (*OF_TEXT, "image_grid_thw")}
        kept |= {LEVEL.format(i): _rows(level) for i, level in enumerate(levels)}
        return kept | {"features": _rows(answer.pooler_output)}

    def put_into(self, batch: dict) -> None:
        """In place of `features`, what the model takes instead of images."""
        rows, levels = batch.pop("features"), []
        while (name := LEVEL.format(len(levels))) in batch:
            levels.append((batch.pop(name),))
        answer = BaseModelOutputWithPooling(pooler_output=(rows,) if self.form is None else rows.view(-1, *self.form))
        answer.deepstack_features = levels
        batch["mm_encoder_outputs"] = {"image": answer}

    @torch.no_grad()
    def _answer(self, encoded: dict):
        images = {name: value.to(self.device) for name, value in encoded.items() if name not in OF_TEXT}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model.get_image_features(**images, return_dict=True)


def _rows(values) -> torch.Tensor:
    values = [values] if torch.is_tensor(values) else values
    return torch.cat([value.flatten(0, -2) for value in values]).cpu()


def keep(samples: Samples, features: Features, cache: Cache) -> None:
    """Put features in the place of the samples' images, on disk, each machine's ranks a share each.

    Raises DataError where there is no room for all.
    """
    keys = {}
    for i, sample in enumerate(samples.samples):
        if sample["images"]:
            known = samples.looks[i].key or cache.key(sample)
            keys[i] = hashlib.sha256(f"{known} {features.weights.hexdigest()} {features.dtype}".encode()).hexdigest()
    share, full = int(os.environ.get("LOCAL_RANK", 0)), False
    ours = [*keys][share :: process_group.local_world_size()]
    for i in tqdm(ours, "features of images", unit="sample", disable=None if share == 0 else True):
        if cache.get(keys[i]) is None:
            made = features.of({name: value for name, value in samples[i].items() if name != "sample"})
            if full := not cache.put(keys[i], made):
                break
    if any(process_group.all_gather(full)):
        raise DataError(
            f"--cache_features: no room for all in {cache.folder}, or no right to write there. "
            "Raise --cache_gb, or choose --samples_dir."
        )
    for i, key in keys.items():
        samples.looks[i] = Look(samples.lengths[i], samples.visual[i], key, None)
    samples.cache, samples.replaced = cache, True
