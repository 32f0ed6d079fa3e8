"""Precomputed features of a frozen vision tower, which replace the images (`--cache_features`).

If the vision tower is frozen anyway, this only saves time. The paper trains it, so freezing it changes the method.
"""

import hashlib
import os

import param_groups
import process_group
import torch
from cache import SampleCache
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data import TEXT_FIELDS, DataError, SampleInfo, Samples

DEEPSTACK = "deepstack_{}"  # Qwen3-VL's further features, which it adds to its first layers


class VisionFeatures:
    """Computes the features of an encoded sample's images, and passes those of a batch to the model."""

    def __init__(self, model: torch.nn.Module, device: torch.device, dtype: torch.dtype, example: dict):
        """`example` is any encoded sample with an image; it shows the shape of this family's features."""
        self.weights = hashlib.sha256()
        for name, weight in model.named_parameters():
            if param_groups.part_of(name, model.config.model_type) != "language":
                self.weights.update(weight.detach().cpu().numpy())
        # The language model is not moved: in float32 it may be too large for the device.
        for name in param_groups.modules_of({"vision", "merger"}, model):
            model.get_submodule(name).to(device)
        self.model = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
        self.device, self.dtype = device, dtype
        features = self._tower_output(example).pooler_output
        self.shape = features.shape[1:] if torch.is_tensor(features) else None

    def replace_images(self, encoded: dict) -> dict:
        """The sample with `features` [visual tokens, H] instead of its pixels."""
        output = self._tower_output(encoded)
        levels = getattr(output, "deepstack_features", None) or []
        replaced = {name: value for name, value in encoded.items() if name in (*TEXT_FIELDS, "image_grid_thw")}
        replaced |= {DEEPSTACK.format(i): _rows(level) for i, level in enumerate(levels)}
        return replaced | {"features": _rows(output.pooler_output)}

    def to_encoder_outputs(self, batch: dict) -> None:
        """Replace a batch's `features`, in place, by the `mm_encoder_outputs` that the model's forward pass takes."""
        rows, levels = batch.pop("features"), []
        while (name := DEEPSTACK.format(len(levels))) in batch:
            levels.append((batch.pop(name),))
        features = (rows,) if self.shape is None else rows.view(-1, *self.shape)
        output = BaseModelOutputWithPooling(pooler_output=features)
        output.deepstack_features = levels
        batch["mm_encoder_outputs"] = {"image": output}

    @torch.no_grad()
    def _tower_output(self, encoded: dict):
        images = {name: value.to(self.device) for name, value in encoded.items() if name not in TEXT_FIELDS}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model.get_image_features(**images, return_dict=True)


def _rows(values) -> torch.Tensor:
    """One tensor or several [..., H] -> [n, H], on the CPU."""
    values = [values] if torch.is_tensor(values) else values
    return torch.cat([value.flatten(0, -2) for value in values]).cpu()


def precompute(samples: Samples, features: VisionFeatures, cache: SampleCache) -> None:
    """Store all samples with features instead of images, and have `samples` return those.

    Collective: the ranks of a machine share its samples. Raises DataError if the cache has no room for all.
    """
    keys = {}
    for i, sample in enumerate(samples.samples):
        if sample["images"]:
            known = samples.infos[i].cache_key or cache.key(sample)
            keys[i] = hashlib.sha256(f"{known} {features.weights.hexdigest()} {features.dtype}".encode()).hexdigest()
    local_rank, full = int(os.environ.get("LOCAL_RANK", 0)), False
    own = [*keys][local_rank :: process_group.local_world_size()]
    for i in tqdm(own, "features of images", unit="sample", disable=None if local_rank == 0 else True):
        process_group.stop_if_asked()
        if cache.get(keys[i]) is None:
            encoded = {name: value for name, value in samples[i].items() if name != "sample"}
            if full := not cache.put(keys[i], features.replace_images(encoded)):
                break
    if any(process_group.all_gather(full)):
        raise DataError(
            f"--cache_features: {cache.folder} has no room for all samples, or cannot be written. "
            "Raise --cache_gb, or choose --samples_dir."
        )
    for i, key in keys.items():
        samples.infos[i] = SampleInfo(samples.lengths[i], samples.visual_lengths[i], key, None)
    samples.cache, samples.has_features = cache, True
