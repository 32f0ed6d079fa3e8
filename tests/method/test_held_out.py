"""What is held out: decided once, by the images' content, and never trained on."""

import json
from pathlib import Path

import baselines
import evaluate
import PI
import pytest
from answered_by_rule import annotate, answers_by, flags

from mpa.files import image_files, records
from mpa.files.records import InputError, read_json
from mpa.method import holdout


def test_what_is_held_out_is_decided_once_by_content_for_every_s_vlm(serve, copied_images, tmp_path):
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, copied_images, run)
    trains = [PI.main(flags(server, copied_images, run, "--hold-out", "0.4", svlm=svlm)) for svlm in ("small", "tiny")]
    held_out = read_json(run / "PI_big_heldout_images.json")
    tested = {image_files.content_hash(r["image_path"]) for r in held_out}
    assert 0.25 < len(tested) / 24 < 0.55
    for train in trains:
        parity = read_json(train)
        assert parity and not tested & {image_files.content_hash(r["image"]) for r in parity}
    copies = [r for r in held_out if Path(r["image_path"]).name.startswith("copy")]
    assert len(copies) in (0, 6)  # copies are on one side
    before = (run / "PI_big_heldout_images.json").read_bytes()
    PI.main(flags(server, copied_images, run, "--hold-out", "0.4", svlm="third"))
    assert (run / "PI_big_heldout_images.json").read_bytes() == before
    with pytest.raises(InputError, match=r"this run holds out 0\.4 of the images, not 0\.1"):
        PI.main(flags(server, copied_images, run, "--hold-out", "0.1", svlm="fourth"))


def test_baselines_leave_out_what_is_held_out_wherever_the_images_lie_now(serve, copied_images, tmp_path):
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, copied_images, run)
    moved = tmp_path / "moved"
    copied_images.rename(moved)
    mapped = ["--path-map", f"{copied_images}={moved}"]
    train = PI.main(flags(server, copied_images, run, "--hold-out", "0.4", *mapped))
    held_out = {image_files.content_hash(r["image_path"]) for r in read_json(run / "PI_big_heldout_images.json")}
    baselines.main(["--pa-json", str(run / "PA_big_images.json"), "--train-json", str(train), *mapped])
    everything = read_json(train.with_name(f"{train.stem}_all_pseudo.json"))
    assert len(everything) > len(read_json(train))
    assert not held_out & {image_files.content_hash(r["image"]) for r in everything}


def test_evaluation_refuses_a_test_set_that_was_trained_on(serve, copied_images, tmp_path):
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, copied_images, run)
    train = PI.main(flags(server, copied_images, run, "--hold-out", "0.4"))
    parity, held_out = read_json(train), read_json(run / "PI_big_heldout_images.json")
    train.write_text(json.dumps([*parity, parity[0] | {"id": "x", "image": held_out[0]["image_path"]}]))
    with pytest.raises(InputError, match="1 of its samples are also in the held-out set"):
        evaluate.main(flags(server, copied_images, run, "--model-path", "small", svlm=None))


def test_more_images_do_not_move_those_that_were_there(tmp_path):
    of = {f"{i}.png": f"{i * 37 % 100:032x}" for i in range(100)}
    first = dict(list(of.items())[:60])
    file = tmp_path / "PI_a_heldout_images.json"
    threshold = holdout.decide(file, first, 0.2)
    holdout.write(file, [], 0.2, threshold)
    assert holdout.decide(file, of, 0.2) == threshold


def test_a_held_out_set_that_does_not_say_what_it_holds_is_named(tmp_path):
    file, train = tmp_path / "PI_a_heldout_images.json", tmp_path / "PI_a_train_a_b_images.json"
    records.write_json(records.meta_path(file), {"settings": {}})
    records.write_json(records.meta_path(train), {"held_out": file.name})
    for read, argument in (
        (lambda held_out: holdout.decide(held_out, {}, 0.2), file),
        (holdout.share_of, file),
        (holdout.threshold_of, train),
    ):
        with pytest.raises(
            InputError, match=r"heldout_images\.meta\.json: does not say (what is|which images are) held out"
        ):
            read(argument)
