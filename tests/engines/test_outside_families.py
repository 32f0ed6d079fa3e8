"""Model types outside the table of families: what works gives transformers' own results, the rest is one line at the start."""

import json

import first_sample
import miniatures
import miniatures_outside
import params
import pytest
import torch
import train
from collator import Collator
from conftest import close
from PIL import Image
from test_families import PIXELS, PROMPTS, plain
from training import arguments, build, conversation, losses, write

import data
from mpa.engines import Request, open_engine
from mpa.engines.preprocessing import Preprocessor
from mpa.files.records import InputError
from mpa.models import families


@pytest.fixture(scope="module", params=miniatures_outside.KINDS)
def outside(request, tmp_path_factory):
    return request.param, miniatures_outside.make(request.param, tmp_path_factory.mktemp(request.param))


def requests(images, n: int = 6, **more) -> list[Request]:
    paths = sorted(map(str, images.rglob("*.png")))
    return [Request(str(i), paths[i], PROMPTS[i % 3], max_new_tokens=6, **more) for i in range(n)]


def replies(path: str, asked: list[Request], **more) -> dict[str, dict]:
    with open_engine("hf", model_path=path, **{"batch_size": 4, "workers": 0, **PIXELS, **more}) as engine:
        found = {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}
        assert not engine.prefix_cache and not engine.last_column
        return found


# --- the engine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_replies_are_those_of_the_plain_loop(outside, images, workers):
    _, path = outside
    asked = requests(images)
    got = replies(path, asked, workers=workers)
    assert [got[r.key]["text"] for r in asked] == plain(path, [(r.image_path, r.prompt) for r in asked], 6)


@pytest.fixture
def unknown(monkeypatch):
    """The table without the families of these tests."""
    kept = {name: family for name, family in families.FAMILIES.items() if name not in ("gemma3", "llava", "qwen2_vl")}
    monkeypatch.setattr(families, "FAMILIES", kept)


def test_an_engine_that_replies_otherwise_than_plain_generate_is_an_error(images, tmp_path, unknown, monkeypatch):
    """With a second start token, as where a processor writes one by itself."""
    path = miniatures.make("gemma3", tmp_path / "model")
    monkeypatch.setattr(families, "tokenizer_options", lambda *_: {})
    with pytest.raises(
        InputError,
        match=r"not in the table of families.* something else here than in transformers' own calls.* --engine",
    ):
        replies(path, requests(images))


def test_an_engine_whose_replies_depend_on_the_batch_is_an_error(images, tmp_path, unknown, monkeypatch):
    path = miniatures.make("llava", tmp_path / "model")
    asked = requests(images)
    assert len(replies(path, asked)) == 6
    original = Preprocessor.process

    def right(self, images, prompts):
        self.tokenizer.padding_side = "right"
        return original(self, images, prompts)

    monkeypatch.setattr(Preprocessor, "process", right)
    with pytest.raises(InputError, match=r"replies otherwise in a batch than alone. Use --batch-size 1"):
        replies(path, asked)
    assert len(replies(path, asked, batch_size=1)) == 6


def test_a_model_that_cannot_be_asked_is_one_line(images, tmp_path, unknown, monkeypatch):
    path = miniatures.make("llava", tmp_path / "model")

    def fails(*_, **__):
        raise AttributeError("'LlavaProcessor' object has no attribute 'image_seq_length'")

    monkeypatch.setattr(families, "match_config", fails)
    with pytest.raises(InputError, match=r"cannot be asked here \(AttributeError: .*image_seq_length'\)"):
        replies(path, requests(images))


def test_images_that_cannot_be_read_do_not_keep_the_others_from_being_compared(images, tmp_path, unknown):
    path = miniatures.make("llava", tmp_path / "model")
    gone = [Request(f"gone{i}", str(tmp_path / "gone.png"), PROMPTS[0]) for i in range(3)]
    got = replies(path, [*gone, *requests(images, 2)])
    assert sum("text" in reply for reply in got.values()) == 2
    assert all("no such file" in reply["error"] for reply in replies(path, gone).values())


# --- the trainer -------------------------------------------------------------------------------------------

FAILS = {"mllama": "cannot be trained here"}  # its mask of the image covers the prompt alone
STEPS = "--per_device_train_batch_size 4 --num_train_epochs 3 --save_strategy no --learning_rate 3e-3".split()


def test_a_training_is_the_models_own_or_one_line_before_the_first_step(outside, tmp_path):
    kind, path = outside
    write(tmp_path, 8)
    if kind in FAILS:
        with pytest.raises(InputError, match=FAILS[kind]):
            train.main(arguments(tmp_path, *STEPS, model=path))
        assert not [*tmp_path.glob("out/*")]
        return
    train.main(arguments(tmp_path, *STEPS, model=path))
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


def test_gradients_are_the_models_own(outside, tmp_path):
    kind, path = outside
    if kind in FAILS:
        return
    write(tmp_path, 3)
    trainer = build(tmp_path, model=path)
    trainer.model.eval()
    samples = [trainer.train_dataset[i] for i in range(3)]
    whole = trainer.data_collator(samples)
    del whole["samples"]
    trainer.model(**whole).loss.backward()
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    batch = trainer.data_collator(samples)
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=(batch["labels"] != data.IGNORE).sum()).backward()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is None or close(parameter.grad, expected[name], 2e-4, least=1e-3 * largest), name


def test_a_shortcut_that_was_not_tested_is_refused_before_anything_is_encoded(tmp_path, monkeypatch):
    path = miniatures_outside.make("glm4v", tmp_path / "model")
    write(tmp_path, 2)
    monkeypatch.setattr(train, "prepare", None)
    with pytest.raises(InputError, match=r"--packing: not tested with model type glm4v.* Leave it out"):
        train.main(arguments(tmp_path, "--packing", "True", model=path))


def test_liger_is_refused_too(tmp_path):
    _, given, training = params.parse(arguments(tmp_path))
    training.use_liger_kernel = True
    with pytest.raises(InputError, match="--use_liger: not tested"):
        first_sample.refuse_untested("glm4v", given, training)
    first_sample.refuse_untested("qwen2_vl", given, training)


def test_a_loss_that_is_not_the_models_own_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    """As where padding is seen: the first sample stands beside a longer one."""
    path = miniatures_outside.make("vipllava", tmp_path / "model")
    write(tmp_path, 4)
    call = Collator.__call__

    def without_mask(self, samples):
        batch = call(self, samples)
        batch["input_ids"] = batch["input_ids"].roll(1, 1)
        batch["labels"] = batch["labels"].roll(1, 1)
        return batch

    monkeypatch.setattr(Collator, "__call__", without_mask)
    with pytest.raises(InputError, match=r"model type vipllava .* loss of the first sample is .* the model's own is"):
        train.main(arguments(tmp_path, *STEPS, model=path))
    assert not [*tmp_path.glob("out/*")]


def test_a_sample_of_text_alone_and_one_of_two_images_are_compared_too(tmp_path):
    path = miniatures_outside.make("vipllava", tmp_path / "model")
    for first in (
        conversation(None, "what is red?", "a color"),
        conversation(["0.png", "1.png"], "<image> <image>?", "no"),
    ):
        records = json.loads(write(tmp_path, 3).read_text())
        (tmp_path / "train.json").write_text(json.dumps([first, *records]))
        trainer = build(tmp_path, model=path)
        trainer.model.train()
        first_sample.check(trainer, trainer.model)
        assert trainer.model.training and torch.is_grad_enabled()


def test_no_image_token_is_known_and_the_estimates_say_nothing():
    class Processor:
        image_processor = type("Images", (), {"max_patches": 3})()

        def _get_num_multimodal_tokens(self, image_sizes):
            return {"num_image_patches": [1]}

    assert families.visual_tokens(Processor(), *Image.new("RGB", (4, 4)).size) is None
