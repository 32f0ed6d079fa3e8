"""What the trainer learns of each family: its answers and their end tokens, after exactly the prompts that are evaluated."""

import miniatures
import pytest
import torch
import train
from collator import Collator
from PIL import Image
from training import arguments, conversation, write_records
from transformers import AutoModelForImageTextToText, AutoProcessor
from turns import refuse_dropped_turns

import data
from mpa.answers.replies import END_TOKENS
from mpa.engines import Request
from mpa.engines.hf import HFEngine
from mpa.files.records import InputError, train_record
from mpa.models.families import image_token_id

ENDS = dict.fromkeys(miniatures.FAMILIES, "<|im_end|>")
ENDS |= dict.fromkeys(("idefics3", "smolvlm"), "<end_of_utterance>") | dict.fromkeys(("llava", "llava_next"), "</s>")
ENDS |= {"granite_vision": "<|end_of_text|>", "gemma3": "<end_of_turn>", "paligemma": "<eos>"}


def test_the_end_token_of_each_family_is_removed_from_replies_of_a_server():
    assert set(ENDS.values()) <= set(END_TOKENS)


@pytest.fixture(scope="module", params=miniatures.FAMILIES)
def family(request, tmp_path_factory):
    return request.param, miniatures.make(request.param, tmp_path_factory.mktemp(request.param))


def encoded(folder, processor, *turns, images=("a.png",)) -> dict:
    path = write_records(folder, conversation(list(images) or None, *turns))
    return data.encode(data.read_samples([path], str(folder))[0], processor)


def answers(sample: dict, processor) -> list[str]:
    """The labelled text, each answer apart."""
    found, labels = [], sample["labels"].tolist()
    for i, label in enumerate(labels):
        if label != data.IGNORE:
            assert label == sample["input_ids"][i]
            found += [[]] if i == 0 or labels[i - 1] == data.IGNORE else []
            found[-1].append(label)
    return [processor.tokenizer.decode(tokens) for tokens in found]


def text_of(sample: dict, processor) -> str:
    """The whole sample as text, an image's tokens as one."""
    kept, token = [], image_token_id(processor)
    for i in sample["input_ids"].tolist():
        kept += [] if i == token and kept[-1:] == [token] else [i]
    return processor.tokenizer.decode(kept)


def test_an_answer_and_its_end_token_are_labelled_after_the_prompt_that_is_evaluated(family, tmp_path):
    name, path = family
    processor = AutoProcessor.from_pretrained(path)
    sample = encoded(tmp_path, processor, "<image>\nwhat is it?", "a circle")
    assert [answer.lstrip() for answer in answers(sample, processor)] == ["a circle" + ENDS[name]]
    assert sample["labels"][-1] != data.IGNORE  # nothing follows
    engine = HFEngine(path, min_pixels=128 * 28 * 28, max_pixels=512 * 28 * 28, dtype="float32")
    engine.load()
    ends = torch.tensor(engine.model.generation_config.eos_token_id)
    assert torch.isin(sample["labels"][-1], ends)  # where generation stops
    asked = engine.prepare([Request("1", str(tmp_path / "a.png"), "what is it?")]).inputs
    length = asked["input_ids"].shape[1]
    if "qwen" not in name:  # whose limits of pixels were not given to this processor
        assert sample["input_ids"][:length].tolist() == asked["input_ids"][0].tolist()
        assert (sample["labels"][:length] == data.IGNORE).all() and sample["labels"][length] != data.IGNORE


def test_each_answer_of_a_conversation_is_labelled_and_closed(family, tmp_path):
    name, path = family
    processor = AutoProcessor.from_pretrained(path)
    turns = ("<image>\nwhat is it?", "a circle", "its color?", "red")
    refused = {"paligemma": "one question and its answer", "qwen3_5": "does not keep the conversation in order"}
    if name in refused:
        with pytest.raises(InputError, match=refused[name]):
            encoded(tmp_path, processor, *turns)
        return
    sample = encoded(tmp_path, processor, *turns)
    assert [answer.strip() for answer in answers(sample, processor)] == [said + ENDS[name] for said in turns[1::2]]
    assert text_of(sample, processor).count("its color?") == 1


def test_a_question_without_an_image_is_encoded_too(family, tmp_path):
    name, path = family
    processor = AutoProcessor.from_pretrained(path)
    sample = encoded(tmp_path, processor, "what is red?", "a color", images=())
    assert [answer.lstrip() for answer in answers(sample, processor)] == ["a color" + ENDS[name]]
    assert sample.keys() == {"input_ids", "labels"}


CONVERSATIONS = {
    "one image": (["a.png"], "<image>\nwhat is it?", "a circle"),
    "none": (None, "what is red?", "a color"),
    "two in a turn": (["a.png", "b.png"], "is <image> like <image>?", "no"),
    "two turns": (["b.png", "a.png"], "<image>\nwhat is it?", "a circle", "<image>\nand this?", "red"),
    "the last turn": (["b.png", "c.png"], "hi", "hello", "<image>\nwhat is it?", "red", "<image> and it?", "blue"),
}


def test_what_passes_the_check_is_what_the_model_takes(family, tmp_path):
    """LLaVA-OneVision cuts only a single image into tiles, so that several turns have no common form."""
    name, path = family
    for file, size in {"b.png": (150, 60), "c.png": (60, 170)}.items():
        Image.new("RGB", size, "blue").save(tmp_path / file)
    processor, passed = AutoProcessor.from_pretrained(path), {}
    for case, (images, *turns) in CONVERSATIONS.items():
        refused = ("llava_onevision", "paligemma", "qwen3_5") if "turn" in case and "in a turn" not in case else ()
        if name in refused:
            with pytest.raises(InputError, match="several turns" if "llava" in name else "id 7: "):
                encoded(tmp_path, processor, *turns, images=images)
        else:
            passed[case] = encoded(tmp_path, processor, *turns, images=images or ())
    model = AutoModelForImageTextToText.from_pretrained(path, dtype="float32")
    for batch in ([sample] for sample in passed.values()), [[*passed.values()]]:
        for samples in batch:
            inputs = Collator(processor)([{**sample, "sample": 7} for sample in samples])
            del inputs["samples"]
            with torch.no_grad():
                assert model(**inputs).loss.isfinite()


DROPPED = ("granite_vision",)  # writes its own system message alone


def with_system(text: str) -> dict:
    record = conversation(["a.png"], "<image>\nwhat is it?", "a circle")
    return record | {"conversations": [{"from": "system", "value": text}, *record["conversations"]]}


@pytest.mark.parametrize("text", ["Answer briefly.", "a"])
def test_a_system_prompt_is_in_the_prompt_or_an_error(family, tmp_path, text):
    name, path = family
    processor, file = AutoProcessor.from_pretrained(path), write_records(tmp_path, with_system(text))
    (sample,) = data.read_samples([file], str(tmp_path))
    if name in DROPPED:
        with pytest.raises(InputError, match=r"json, record 0: turn 1 \(system\): .* drops its text.* Put it into a"):
            refuse_dropped_turns([sample], processor)
        with pytest.raises(InputError, match=r"id 7: turn 1 \(system\): .* drops its text, 'Answer"):
            encoded_with(tmp_path, processor, with_system("Answer briefly."))
    elif name == "paligemma":
        with pytest.raises(InputError, match="one question and its answer"):
            data.encode(sample, processor)
    else:
        refuse_dropped_turns([sample], processor)
        before = processor.tokenizer.decode(data.encode(sample, processor)["input_ids"]).partition("what is it?")[0]
        assert text in before


def encoded_with(folder, processor, record: dict) -> dict:
    return data.encode(data.read_samples([write_records(folder, record)], str(folder))[0], processor)


def test_a_training_whose_system_prompts_would_be_lost_ends_before_the_model_is_loaded(tmp_path, monkeypatch):
    path = miniatures.make("granite_vision", tmp_path / "model")
    records = [train_record(i, "a.png", "what?", "red") for i in range(3)] + [with_system("Answer briefly.")]
    write_records(tmp_path, *records)
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(InputError, match=r"train\.json, record 3: turn 1 \(system\)"):
        train.main(arguments(tmp_path, model=path))


TEMPLATES = {
    "drops": ("{{ 'USER: <image> ' }}", r"turn 1 \(user\): the model's chat template drops its text"),
    "refuses": ("{{ raise_exception('no images') }}", r"chat template refuses the conversation \(no images\)"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_that_drops_or_refuses_a_question_is_an_error_in_the_engine_too(tmp_path, kind):
    path, (template, says) = miniatures.make("llava", tmp_path / "model"), TEMPLATES[kind]
    (tmp_path / "model/chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=says):
        HFEngine(path, dtype="float32").load()
    write_records(tmp_path, train_record(1, "a.png", "what?", "red"))
    with pytest.raises(InputError, match=f"record 0: .*{says}"):
        train.main(arguments(tmp_path, model=path))


def test_a_question_that_the_template_changes_costs_only_itself(tmp_path):
    """As Qwen3's template, which leaves reasoning out of all but the last turn."""
    path = miniatures.make("llava", tmp_path / "model")
    template = tmp_path / "model/chat_template.jinja"
    template.write_text(template.read_text().replace("p.text", "p.text.split('</think>')[-1]"))
    write_records(tmp_path, train_record(1, "a.png", "what?", "red"))
    questions = ["what is it?", "<think>no</think>what is it?"]
    with HFEngine(path, dtype="float32") as engine:
        asked = [Request(str(i), str(tmp_path / "a.png"), q, max_new_tokens=2) for i, q in enumerate(questions)]
        replies = {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}
    assert "text" in replies["0"] and "drops its text, '<think>no" in replies["1"]["error"]


@pytest.mark.parametrize(
    ("name", "text", "learnt"),
    [
        (
            "llava",
            "USER: <image>\nwhat is it? ASSISTANT: a circle</s>USER: its color? ASSISTANT: red</s>",
            [" a circle</s>", " red</s>"],
        ),
        (
            "llava_next",
            "[INST] <image>\nwhat is it? [/INST] a circle</s>[INST] its color? [/INST] red</s>",
            [" a circle</s>", " red</s>"],
        ),
        (
            "llava_onevision",
            "<|im_start|>user <image>\nwhat is it?<|im_end|><|im_start|>assistant\na circle<|im_end|>"
            "<|im_start|>user \nits color?<|im_end|><|im_start|>assistant\nred<|im_end|>",
            ["a circle<|im_end|>", "red<|im_end|>"],
        ),
        (
            "gemma3",
            "<bos><start_of_turn>user\n\n\n<start_of_image><image_soft_token><end_of_image>\n\nwhat is it?<end_of_turn>\n"
            "<start_of_turn>model\na circle<end_of_turn>\n<start_of_turn>user\nits color?<end_of_turn>\n"
            "<start_of_turn>model\nred<end_of_turn>",
            ["a circle<end_of_turn>", "red<end_of_turn>"],
        ),
    ],
)
def test_the_text_is_that_of_the_published_form(tmp_path, name, text, learnt):
    """LLaVA-1.5's template closes no answer, and writes a space there: the end token takes its place, as in its training."""
    processor = AutoProcessor.from_pretrained(miniatures.make(name, tmp_path / name))
    sample = encoded(tmp_path, processor, "<image>\nwhat is it?", "a circle", "its color?", "red")
    assert text_of(sample, processor) == text
    assert answers(sample, processor) == learnt


def test_paligemmas_sample_is_that_of_its_processor(tmp_path):
    processor = AutoProcessor.from_pretrained(miniatures.make("paligemma", tmp_path / "model"))
    sample = encoded(tmp_path, processor, "<image>\nwhat is it?", "a circle")
    image = data.open_image(str(tmp_path / "a.png"))
    own = processor(text=["<image>what is it?"], images=[[image]], suffix=["a circle"], return_tensors="pt")
    assert torch.equal(sample["input_ids"], own["input_ids"][0])
    assert torch.equal(sample["labels"], own["labels"][0])
    assert torch.equal(sample["pixel_values"], own["pixel_values"])
    batch = data_batch(processor, sample)
    assert torch.equal(batch["token_type_ids"], own["token_type_ids"])


def data_batch(processor, sample: dict) -> dict:
    return Collator(processor)([{**sample, "sample": 1}])


def test_gemmas_images_are_marked_as_its_processor_marks_them(tmp_path):
    processor = AutoProcessor.from_pretrained(miniatures.make("gemma3", tmp_path / "model"))
    sample = encoded(tmp_path, processor, "<image>\nwhat is it?", "a circle")
    own = processor(text=[text_with_one_image(processor)], images=[[data.open_image(str(tmp_path / "a.png"))]])
    marked = data_batch(processor, sample)["token_type_ids"][0]
    assert int(marked.sum()) == 16 == sum(own["token_type_ids"][0])


def text_with_one_image(processor) -> str:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    return processor.apply_chat_template([message], add_generation_prompt=True)
