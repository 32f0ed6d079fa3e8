"""Limits of pixels and tiles are obeyed, in stages and trainer alike, and the tokens of an image are counted from its size."""

import json

import miniatures
import model_loading
import PA
import params
import pytest
import resume_settings
from conftest import python
from PIL import Image
from training import build, write

from mpa.data import image_check
from mpa.data.protocol import Sample
from mpa.engines import Request, open_engine
from mpa.files.records import InputError
from mpa.models import families, loading, visual_tokens
from mpa.stages import stage

SIZES = [(64, 64), (386, 386), (800, 600), (1000, 300), (300, 1000), (57, 113), (30, 390)]
PIXELS = (3136, 50_000)
# What the published checkpoints say; the miniatures have smaller tiles.
PUBLISHED = {
    "idefics3": {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
    "smolvlm": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
    "internvl": {"size": {"height": 448, "width": 448}, "max_patches": 12},
    "llava_next": {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]},
}
PUBLISHED["llava_next"] |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
TILED = [name for name in miniatures.FAMILIES if families.FAMILIES[miniatures.model_type(name)].limit == "tiles"]


@pytest.fixture(scope="module", params=miniatures.FAMILIES)
def checkpoint(request, tmp_path_factory):
    return miniatures.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=TILED)
def tiled(request, tmp_path_factory):
    return miniatures.make(request.param, tmp_path_factory.mktemp(request.param))


def made(processor, size) -> tuple[int, int]:
    """(image tokens, tiles, the whole image among them) in what the processor makes of an image of this size."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    text = families.chat_text(processor, [message])
    inputs = processor(text=[text], images=[[Image.new("RGB", size)]], return_tensors="pt")
    pixels = inputs["pixel_values"]
    tiles = pixels.shape[-4] if pixels.dim() > 3 else len(pixels)
    return int((inputs["input_ids"] == families.image_token_id(processor)).sum()), tiles


def test_the_count_from_sizes_is_that_of_the_processors_output(checkpoint):
    for max_tiles in (None, 2, 6):
        processor = loading.load_processor(checkpoint, *PIXELS, max_tiles=max_tiles)
        for size in SIZES:
            assert families.visual_tokens(processor, *size) == made(processor, size)[0], (max_tiles, size)


def test_an_image_has_at_most_so_many_tiles_besides_the_whole(tiled):
    seen = {}
    for max_tiles in (2, 4, 6, 9, 20):
        processor = loading.load_processor(tiled, *PIXELS, max_tiles=max_tiles)
        tiles = [made(processor, size)[1] for size in SIZES]
        assert max(tiles) <= max_tiles + 1
        seen[max_tiles] = max(tiles)
    assert seen[2] < seen[20]


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_sizes_of_tiles_are_counted_too(tmp_path, family):
    processor = loading.load_processor(miniatures.make(family, tmp_path), *PIXELS)
    for name, value in PUBLISHED[family].items():
        setattr(processor.image_processor, name, value)
    for max_tiles in (None, 4):
        families.apply_limits(processor, family, *PIXELS, max_tiles)
        for size in SIZES[1:4]:
            tokens, tiles = made(processor, size)
            assert families.visual_tokens(processor, *size) == tokens
            assert max_tiles is None or tiles <= max_tiles + 1


def test_smolvlm_enlarges_a_small_image_to_17_tiles_and_fewer_if_asked(tmp_path):
    processor = loading.load_processor(miniatures.make("smolvlm", tmp_path), *PIXELS)
    for name, value in PUBLISHED["smolvlm"].items():
        setattr(processor.image_processor, name, value)
    processor.image_seq_len = 64
    counts = {}
    for max_tiles in (None, 16, 9, 8, 3, 1):
        families.apply_limits(processor, "smolvlm", *PIXELS, max_tiles)
        counts[max_tiles] = families.visual_tokens(processor, 386, 386)
    assert counts == {None: 1088, 16: 1088, 9: 640, 8: 320, 3: 64, 1: 64}


def test_internvl_has_6_tiles_by_default_and_fewer_where_the_checkpoint_says_so(tmp_path):
    processor = loading.load_processor(miniatures.make("internvl", tmp_path), *PIXELS)
    assert processor.image_processor.max_patches == 3
    processor.image_processor.max_patches = 12
    families.apply_limits(processor, "internvl", *PIXELS)
    assert processor.image_processor.max_patches == 6
    families.apply_limits(processor, "internvl", *PIXELS, 12)
    assert processor.image_processor.max_patches == 12


def test_fewer_tiles_than_a_family_can_make_are_an_error_that_says_so(tmp_path):
    path = miniatures.make("llava_next", tmp_path)
    with pytest.raises(InputError, match="--max-tiles 1: its processor cuts every image into 2 tiles or more"):
        loading.load_processor(path, *PIXELS, max_tiles=1)
    with pytest.raises(InputError, match="--max-tiles 1: its processor"):
        given = params.DataArguments(data_path=[], max_tiles=1)
        model_loading.load_processor(params.ModelArguments(model_id=path), given)


def test_the_engine_answers_and_the_trainer_trains_on_the_same_tiles(tiled, tmp_path):
    write(tmp_path, 4)
    Image.new("RGB", (300, 100), "red").save(tmp_path / "0.png")
    lengths = {}
    for max_tiles in (2, 9):
        trainer = build(tmp_path, "--max_tiles", str(max_tiles), model=tiled)
        trainer.model.eval()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=1)
        settings = {"min_pixels": 3136, "max_pixels": 3136, "dtype": "float32", "workers": 0}
        with open_engine("hf", model_path=tiled, max_tiles=max_tiles, **settings) as engine:
            asked = [Request(str(i), str(tmp_path / f"{i}.png"), "what?", 4) for i in range(4)]
            assert len([reply["text"] for replies in engine.generate(asked) for reply in replies]) == 4
            processors = [
                p.image_processor.to_dict() for p in (engine.preprocessor.processor, trainer.processing_class)
            ]
            assert processors[0] == processors[1]
            count = engine.preprocessor.processor
        sizes = [Image.open(tmp_path / f"{i}.png").size for i in range(4)]
        assert trainer.train_dataset.visual_lengths == [families.visual_tokens(count, *size) for size in sizes]
        lengths[max_tiles] = trainer.train_dataset.visual_lengths[0]
    assert lengths[2] < lengths[9]


def arguments(max_tiles: int | None):
    return PA.arguments(["--dataset", "easyVQA", *(["--max-tiles", str(max_tiles)] if max_tiles else [])])


def test_the_limit_of_tiles_belongs_to_the_settings_where_it_has_an_effect(tmp_path):
    paths = {name: miniatures.make(name, tmp_path / name) for name in ("internvl", "smolvlm", "llava", "qwen2_vl")}
    found = {
        (name, given): stage.Stage(
            stage.AskedModel(arguments(given), path), tmp_path / "out.json", "PA", []
        ).settings.get("max_tiles")
        for name, path in paths.items()
        for given in (None, 4)
    }
    assert found == {
        ("internvl", None): 6,
        ("internvl", 4): 4,
        ("smolvlm", None): None,
        ("smolvlm", 4): 4,
        **{(name, given): None for name in ("llava", "qwen2_vl") for given in (None, 4)},
    }
    for (name, given), limit in found.items():
        more = ("--max_tiles", str(given)) if given else ()
        flags = ["--model_id", paths[name], "--data_path", "x.json", "--output_dir", "out", "--use_cpu", "True", *more]
        (tmp_path / "x.json").write_text("[]")
        model_args, data_args, args = params.parse([flag.replace("x.json", str(tmp_path / "x.json")) for flag in flags])
        assert resume_settings.settings(model_args, data_args, args).get("max_tiles") == limit


def test_a_limit_without_effect_and_an_unknown_family_are_said_when_a_model_is_loaded(tmp_path, capsys):
    path = tmp_path / "llava"
    miniatures.make("llava", path)
    model = stage.AskedModel(arguments(4), str(path))
    model.engine()
    assert capsys.readouterr().err == (
        "--max-tiles has no effect for llava: each image has the same number of tokens.\n"
    )
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    model.engine()
    assert "warning: model type unheard_of is not in the table of families" in capsys.readouterr().err


def test_the_check_of_a_dataset_counts_the_tokens_of_the_model_that_is_named(tmp_path, images):
    path = miniatures.make("internvl", tmp_path)
    samples = [Sample(i, str(file)) for i, file in enumerate(sorted(images.rglob("*.png")))]
    count = visual_tokens.Counter(path, *PIXELS, 2)
    for model, whose in ((path, "InternVL"), (None, "Qwen2-VL")):
        found = image_check.check(samples, 1, *PIXELS, 2, model)
        assert found.whose == whose and not found.broken
        if model:
            assert found.visual_tokens == [count(*Image.open(sample.image_path).size) for sample in samples]
            assert sum(found.visual_tokens) == visual_tokens.total([s.image_path for s in samples], count)


def test_a_stage_counts_and_records_its_tiles_and_refuses_to_go_on_with_others(tmp_path):
    path = miniatures.make("smolvlm", tmp_path / "model")
    command = [
        "--dataset",
        "easyVQA",
        "--model-path",
        path,
        "--limit",
        "3",
        "--max-new-tokens",
        "2",
        "--run",
        f"{tmp_path}/",
    ]
    command += ["--device", "cpu", "--workers", "0"]
    counts = {}
    for max_tiles in (1, 4):
        done = python("evaluate.py", *command, "--max-tiles", max_tiles, "--dry-run")
        assert done.returncode == 0, done.stderr
        counts[max_tiles] = int(done.stdout.partition("visual tokens of SmolVLM: ")[2].split()[0])
    assert counts == {1: 3 * 4, 4: 3 * 5 * 4}  # 4 tokens of each tile
    assert python("evaluate.py", *command, "--max-tiles", 4).returncode == 0
    (meta,) = tmp_path.glob("Eval_*.meta.json")
    assert json.loads(meta.read_text())["settings"]["max_tiles"] == 4
    refused = python("evaluate.py", *command, "--max-tiles", 1)
    assert refused.returncode and "max_tiles was 4, is now 1" in refused.stderr
