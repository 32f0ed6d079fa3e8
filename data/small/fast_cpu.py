"""The same functions, faster to train on a CPU: patch embeddings as matrix products, and no fused attention.

PyTorch's convolutions and fused attention have slow backward passes in bfloat16 there: together two thirds of a step.
"""

from types import MethodType

from architectures import PATCH, PATCHES
from torch.nn.functional import linear
from training_images import GRID
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision


def see_alike(self, hidden_states, cu_seqlens, position_embeddings=None, **_):
    """Qwen2-VL's vision attention for images of one size, at once; the library takes them one by one."""
    qkv = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1)
    query, key = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], *position_embeddings)
    parts = (query, key.to(qkv.dtype), qkv[:, 2])
    query, key, value = (x.view(-1, PATCHES, *x.shape[1:]).transpose(1, 2).to(qkv.dtype) for x in parts)
    weight = (query * self.scaling @ key.transpose(2, 3)).softmax(-1).to(qkv.dtype)
    return self.proj((weight @ value).transpose(1, 2).reshape(len(hidden_states), -1))


def embed_qwen(self, hidden_states):
    return linear(hidden_states, self.proj.weight.flatten(1))


def embed_internvl(self, pixel_values):
    cut = (
        pixel_values.view(-1, 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(-1, PATCHES, 3 * PATCH**2)
    )
    return linear(cut, self.projection.weight.flatten(1), self.projection.bias)


FASTER = {"VisionAttention": see_alike, "PatchEmbed": embed_qwen, "InternVLVisionPatchEmbeddings": embed_internvl}


def speed_up(model) -> None:
    """Replace the slow functions of a model, for its training."""
    model.set_attn_implementation("eager")
    for module in model.modules():
        if type(module).__name__ in FASTER:
            module.forward = MethodType(FASTER[type(module).__name__], module)
