"""The openai engine's address, key and proxies: checked before anything is sent; and no secret in what is kept or said."""

import base64
import json
import urllib.parse

import pytest
from conftest import python
from fake_server import annotate_or_answer, completion
from server_requests import asked, collect, stage_flags

from mpa.engines.endpoint import Endpoint
from mpa.files.records import InputError, without_secrets


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    for name in ("OPENAI_BASE_URL", *(f"{s}_proxy" for s in ("http", "https", "all", "no"))):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        *((url, "is empty") for url in ("", " ", "\n")),
        *((f"http://127.0.0.1:{port}/v1", "from 1 to 65535") for port in ("70000", "65536", "abc", "-1", "٣", "9\\v1")),
        ("http://127.0.0.1:0/v1", "port 0"),
        *((url, "must start with http://") for url in ("127.0.0.1:9/v1", "localhost/v1", "//x/v1", "ftp://x", "http:/x")),
        *((url, "a space or a line break") for url in (" http://x/v1", "http://x/v1\n", "http://exa mple/v1", "http://x\t/")),
        *((url, "names no host") for url in ("http://", "http:///v1", "http://:80/v1")),
        *((url, "not a valid address") for url in ("http://[::1/v1", "http://[zz]:9/v1", "http://256.1.1.1/v1", "http://a..b/v1")),
        ("http://::1:9/v1", "needs brackets"),
        ("http://[::1]:99999/v1", "from 1 to 65535"),
        ("http://h/v1?api-key=hunter2", "with a query"),
        *((url, "--base-url") for url in ("me:hunter2@host/v1", "http://me:hunter2@host:9a/v1", "http://me:hun/ter2@host/v1")),
    ],
)  # fmt: skip
def test_an_address_is_checked_before_anything_is_sent(url, says):
    with pytest.raises(InputError) as error:
        Endpoint(url)
    assert says in str(error.value) and "ter2" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://[::1]:9/v1", "HTTP://localhost/v1", "http://host_name:9", "http://[fe80::1%25eth0]:9/v1"]
)
def test_an_address_of_any_valid_form_is_taken(url):
    assert Endpoint(url).url == url


def test_an_empty_variable_does_not_mean_openai(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", " ")
    with pytest.raises(InputError, match="OPENAI_BASE_URL is empty"):
        Endpoint(None)
    assert Endpoint("http://x/v1").server == "http://x/v1"


@pytest.mark.parametrize("key", ["sk-x\n", "sk-x\r\nX: y", " sk-x", "sk x", "käy", "\ud800", " ", "sk\x00"])
def test_a_key_that_no_header_can_hold_is_refused(monkeypatch, key):
    monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": key})
    with pytest.raises(InputError, match="OPENAI_API_KEY holds a space, a line break") as error:
        Endpoint("http://x/v1")
    assert "sk" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        *((n, "socks5://h:1", "needs the package socksio") for n in ("ALL_PROXY", "all_proxy", "HTTP_PROXY", "https_proxy")),
        ("ALL_PROXY", "socks5h://h:1", "unset ALL_PROXY"),
        *(("http_proxy", v, "must start with") for v in ("socks4://h:1", "foo://h:1", "://")),
        ("HTTP_PROXY", "http://me:hunter2@127.0.0.1:99999", "from 1 to 65535"),
        ("http_proxy", "http://", "names no host"),
        ("http_proxy", " ", "a space"),
    ],
)  # fmt: skip
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch, name, value, says):
    monkeypatch.setattr("mpa.engines.endpoint.find_spec", lambda name: None)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=name) as error:
        Endpoint("http://x/v1")
    assert says in str(error.value) and "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "value", ["[::1", ",,:::,http://[x,*.,/,::1/200,1.2.3.4/99,a/b", "http://x:99999", "é.com,\udcff"]
)
def test_rubbish_in_no_proxy_is_passed_over(images, serve, monkeypatch, value):
    monkeypatch.setenv("NO_PROXY", value)
    found, failure, _ = collect(serve(annotate_or_answer), asked(images, 1))
    assert failure is None and "text" in found["q0"]


def test_what_else_the_client_finds_amiss_is_one_line(images, serve, monkeypatch):
    server = serve(annotate_or_answer)
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    _, failure, _ = collect(server, asked(images, 1))
    assert "no connection can be made" in str(failure) and "SSL_CERT_FILE" in str(failure)


@pytest.mark.parametrize("arguments", [["--base-url", ""], ["--base-url", "localhost:8000/v1"]])
def test_a_stage_checks_the_address_first(images, tmp_path, arguments):
    flags = ["--dataset", "images", "--image-root", images, "--engine", "openai", "--model-path-lvlm", "m"]
    done = python("PA.py", *flags, *arguments, "--run", f"{tmp_path}/run")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--base-url" in done.stderr
    assert not list((tmp_path / "run").glob("*.json*"))


def test_the_cause_of_a_failed_connection_is_told_at_once(images, monkeypatch, capsys):
    monkeypatch.setattr("mpa.engines.pacing.MAX_BACKOFF", 0.01)
    monkeypatch.setenv("http_proxy", "http://me:hunter2@127.0.0.1:9")
    server = type("Server", (), {"url": "http://somewhere.example/v1"})
    _, failure, _ = collect(server, asked(images, 1))
    said = capsys.readouterr().err
    assert "through the proxy http://127.0.0.1:9" in said and "Connect call failed ('127.0.0.1', 9)" in said
    assert said.count("Trying again") == 1 and "Connect call failed" in str(failure) and "hunter2" not in said


def forms(secret: str) -> list[str]:
    quoted = urllib.parse.quote(secret, safe="")
    basic = [base64.b64encode((user + secret).encode()).decode() for user in ("", ":", "u:", "me:")]
    return [secret, quoted, quoted.lower(), json.dumps(secret), repr(secret), secret.encode().hex(), *basic]


@pytest.mark.parametrize("key", ["sk-very-secret", 'sk/a+b="c\\d&e'])
def test_the_key_is_known_in_every_form(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    endpoint = Endpoint("http://me:hunter2@x/v1")
    for form in [*forms(key), "hunter2", base64.b64encode(b"me:hunter2").decode()]:
        kept = endpoint.redact({form: [f"a {form} b"]})
        assert form not in str(kept) and "…" in str(kept)
    assert endpoint.redact({"n": [1, None, "red"]}) == {"n": [1, None, "red"]}
    assert without_secrets("http://me:p@ss@x/v1") == "http://x/v1"


def test_a_stand_in_for_a_key_is_not_cut_out_of_replies(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "ollama")
    assert Endpoint("http://x/v1").redact("an ollama") == "an ollama"


BODIES = {
    "refusal": lambda k: (400, {"error": {"message": f"no: {k}"}}),
    "flagged": lambda k: (200, completion() | {"choices": [{"message": {"content": None, "refusal": f"no {k}"}}]}),
    "not JSON": lambda k: (200, f"<html>{k}{'x' * 200}</html>".encode()),
    "cut JSON": lambda k: (200, json.dumps({"choices": k})[:-2].encode()),
    "no reply": lambda k: (200, {"choices": None, "key": k}),
    "odd error": lambda k: (500, f"Bearer {k}".encode()),
    "reply": lambda k: (200, completion(f"Question: what is {k}?\nAnswer: {k}")),
    "reason": lambda k: (200, completion() | {"choices": [completion()["choices"][0] | {"finish_reason": k}]}),
    "header": lambda k: (429, {"error": {"message": k}}, {"Retry-After": "0.01", "X-Key": k}),
}


@pytest.mark.parametrize(
    ("body", "form"), [*((body, 0) for body in BODIES), ("refusal", 1), ("not JSON", 6), ("reply", 2), ("odd error", 9)]
)
def test_no_form_of_the_key_gets_into_a_file_or_a_message(images, serve, tmp_path, monkeypatch, body, form):
    monkeypatch.setattr("mpa.engines.pacing.MAX_BACKOFF", 0.01)
    key = "sk-v/ery+secret"
    hidden = forms(key)[form]

    def rule(asked, number):
        odd = number % 3 == 1 and number < 8
        return BODIES[body](hidden) if odd else annotate_or_answer(asked)

    server = serve(rule)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    flags = stage_flags(server, images, 4)
    done = python("PA.py", *flags, "--model-path-lvlm", "m", "--concurrency", "1", "--run", f"{tmp_path}/")
    assert done.returncode == 0, done.stderr
    assert hidden not in done.stdout + done.stderr
    for path in filter(lambda path: path.is_file(), tmp_path.rglob("*")):
        assert hidden.encode() not in path.read_bytes()


def test_a_key_in_request_json_is_refused(monkeypatch):
    with pytest.raises(InputError, match="holds your key"):
        Endpoint("http://x/v1", {"user": "sk-very-secret"})
