"""Judges that answer by a rule, behind a server that fails in every way, and the demo world's truth."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import random_transcoder, tiny_lm, unchecked_types

from tclib.blind import judge
from tclib.blind.contexts import (
    Context,
    Contexts,
    contexts,
    detection_items,
    example_line,
    examples,
    fuzzing_items,
    intruder_trials,
)
from tclib.blind.endpoint import (
    MAX_WAIT,
    Asker,
    Endpoint,
    Prompt,
    endpoint_from_environment,
)
from tclib.blind.judge import Found, Judge, Judged, parse_list, parse_number
from tclib.blind.judge_validation import distinction, latent_in_words, validate_judge
from tclib.blind.latents import LabelledRows, labelled_rows
from tclib.features.examples import feature_activations
from tclib.models.language_model import LanguageModel
from tclib.replication.judging import Asked, judge_feature
from tclib.support.errors import InputError

KEY = "sk-secret-0123456789"
PROMPT = Prompt("Be brief.", "Say yes.", 8)
Rule = Callable[[str], str]


class Server:
    """An endpoint on this machine: answers by a rule, after the faults that it is given."""

    def __init__(self) -> None:
        self.rule: Rule = lambda _: "yes"
        self.faults: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        own = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                own.requests.append(json.loads(self.rfile.read(size)))
                own.keys.add(self.headers["Authorization"])
                if own.faults:
                    own.faults.pop(0)(self)
                else:
                    said = own.rule(own.requests[-1]["messages"][-1]["content"])
                    reply(self, 200, completion(said))

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def asker(self, cache: Path | None = None, **values: Any) -> Asker:
        self.waits: list[float] = []
        endpoint = Endpoint(model="m", base_url=self.url, **values)
        return Asker(endpoint, cache, KEY, sleep=self.waits.append)


def completion(said: Any) -> bytes:
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    return json.dumps({"choices": [{"message": {"content": said}}], "usage": usage}).encode()


def reply(to: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    to.send_response(status)
    for name, value in {"Content-Type": "application/json", **headers}.items():
        to.send_header(name.replace("_", "-"), value)
    to.send_header("Content-Length", str(len(body)))
    to.end_headers()
    to.wfile.write(body)


def status(number: int, message: str = "no", **headers: str) -> Callable[..., None]:
    body = json.dumps({"error": {"message": message}}).encode()
    return lambda to: reply(to, number, body, **headers)


def says(body: bytes) -> Callable[..., None]:
    return lambda to: reply(to, 200, body)


def cut(to: BaseHTTPRequestHandler) -> None:
    to.send_response(200)
    to.send_header("Content-Length", "1000")
    to.end_headers()
    to.wfile.write(b'{"choices"')
    to.close_connection = True


def late(to: BaseHTTPRequestHandler) -> None:
    time.sleep(0.6)
    to.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "TCLIB_JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)


# -- the endpoint ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "waits"),
    [
        ([], []),
        ([status(429, Retry_After="3")], [3.0]),
        ([status(429, Retry_After="soon")], [1.0]),
        ([status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")], [0.0]),
        ([status(500), status(503)], [1.0, 2.0]),
        ([cut], [1.0]),
        ([says(b'{"choices": ')], [1.0]),
        ([says(b'{"choices": []}')], [1.0]),
        ([says(b"[" * 50_000)], [1.0]),
        ([says(completion(3))], [1.0]),
        ([says(b"\xff\xfe")], [1.0]),
    ],
)
def test_what_passes_is_tried_again(server: Server, faults: list[Any], waits: list[float]) -> None:
    server.faults = list(faults)
    assert server.asker().ask(PROMPT) == "yes"
    assert server.waits == waits and len(server.requests) == len(faults) + 1
    assert server.requests[0]["temperature"] == 0.0 and server.requests[0]["max_tokens"] == 8


def test_a_server_that_is_slow_is_tried_again(server: Server) -> None:
    server.faults = [late]
    assert server.asker(timeout=0.3).ask(PROMPT) == "yes"
    assert server.waits == [1.0]


@pytest.mark.parametrize(
    ("fault", "words", "n_requests"),
    [
        (status(500), r"status 500 \(no\), after 3 tries", 3),
        (status(429, Retry_After="99999"), r"status 429 \(no\): see that the server", 1),
        (cut, "the connection failed .* after 3 tries", 3),
        (says(b"{"), "no chat completion in JSON, after 3 tries", 3),
        (status(401, f"wrong key {KEY}"), r"the key is refused \(status 401\)", 1),
        (status(404, f"no model m for {KEY}\n"), r"status 404 \(no model m for \(key\)\)", 1),
    ],
)
def test_what_does_not_pass_is_one_sentence(
    server: Server, fault: Any, words: str, n_requests: int
) -> None:
    server.faults = [fault] * 5
    with pytest.raises(InputError, match=words) as caught:
        server.asker(n_tries=3).ask(PROMPT)
    assert len(server.requests) == n_requests
    sentence = str(caught.value)
    assert "\n" not in sentence and KEY not in sentence and len(sentence) < 500
    assert caught.value.__context__ is None and all(wait <= MAX_WAIT for wait in server.waits)


def test_no_server_at_all_is_one_sentence() -> None:
    endpoint = Endpoint(model="m", base_url="http://127.0.0.1:9/v1", n_tries=2)
    with pytest.raises(InputError, match="the connection failed .* after 2 tries: see that"):
        Asker(endpoint, api_key=KEY, sleep=lambda _: None).ask(PROMPT)


def test_what_was_answered_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    prompts = [PROMPT._replace(user=f"Say {i}.") for i in range(4)]
    server.rule = lambda user: user[4:5]
    first = server.asker(tmp_path, price_in=1e6, price_out=2e6)
    server.faults = [status(400)]
    with pytest.raises(InputError, match="status 400"):
        first.ask(prompts[3])  # the run stops, and goes on
    assert [first.ask(prompt) for prompt in prompts[:2]] == ["0", "1"]
    assert first.usage.cost(first.endpoint) == 2 * 10 + 2 * 2 * 2
    again, n_before = server.asker(tmp_path), len(server.requests)
    assert [again.ask(prompt) for prompt in prompts] == ["0", "1", "2", "3"]
    assert len(server.requests) == n_before + 2
    assert (again.usage.n_asked, again.usage.n_from_cache) == (2, 2)
    assert "cost unknown" in again.usage.in_words(again.endpoint)
    third, n_before = server.asker(tmp_path), len(server.requests)
    assert [third.ask(prompt) for prompt in prompts] == ["0", "1", "2", "3"]
    assert len(server.requests) == n_before
    # Another question, as a model or its parameters are another, has another answer.
    third.ask(prompts[0]._replace(max_tokens=9))
    assert len(server.requests) == n_before + 1


@pytest.mark.parametrize("n", [2, 3, 10])
def test_an_echo_of_the_question_is_no_answer(n: int) -> None:
    texts = "\n".join(f"{i}. The dog sleeps." for i in range(1, n + 1))
    for task, question in judge.QUESTIONS.items():
        said = question.format(explanation="dogs", texts=texts) + judge.FORM.format(n=n)
        assert judge.parse_list(said, n) is None, task
    assert judge.parse_number(judge.INTRUDER.format(texts=texts), n) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"format": "tclib-answer-1"}'])
def test_a_damaged_answer_is_named_and_asked_again(
    server: Server, tmp_path: Path, content: bytes
) -> None:
    server.asker(tmp_path).ask(PROMPT)
    (path,) = tmp_path.iterdir()
    kept = path.read_bytes()
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{path.name}.*asked again"):
        assert server.asker(tmp_path).ask(PROMPT) == "yes"
    assert path.read_bytes() == kept and len(server.requests) == 2
    other = path.with_name("0" * 64 + ".json")
    path.rename(other)
    path.write_text(other.read_text().replace(path.stem, other.stem))
    with pytest.warns(UserWarning, match="the answer to another question"):
        server.asker(tmp_path).ask(PROMPT)
    path.write_text(path.read_text().replace('"yes"', '"no"'))
    with pytest.warns(UserWarning, match="an answer that was changed since: it is asked again"):
        assert server.asker(tmp_path).ask(PROMPT) == "yes"


def test_the_key_is_sent_and_is_nowhere_else(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    server.rule = lambda _: f"your key is {KEY}"
    endpoint, shown = Endpoint(model="m", base_url=server.url), list[str]()
    asker = Asker(endpoint, tmp_path, show=shown.append)
    assert asker.ask(PROMPT) == "your key is (key)"
    assert server.keys == {f"Bearer {KEY}"}
    held = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    said = (
        repr(asker) + str(vars(asker)) + repr(endpoint) + "".join(shown) + str(capsys.readouterr())
    )
    assert b"your key" in held and KEY.encode() not in held and KEY not in said
    with pytest.raises(InputError, match="not pickled or copied"):
        __import__("pickle").dumps(asker)
    for bad in ("sk-ü-secret", "sk-\x00-secret", b"sk-secret"):
        with unchecked_types(), pytest.raises(InputError, match="printable ASCII") as caught:
            Asker(endpoint, api_key=bad)  # type: ignore[arg-type]
        assert "secret" not in str(caught.value)


def test_what_is_missing_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="set TCLIB_JUDGE_MODEL"):
        endpoint_from_environment()
    monkeypatch.setenv("TCLIB_JUDGE_MODEL", "m")
    with pytest.raises(InputError, match="needs a key: set OPENAI_API_KEY"):
        Asker(endpoint_from_environment())
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    endpoint = endpoint_from_environment(timeout=3)
    assert (endpoint.model, endpoint.base_url) == ("m", "http://127.0.0.1:1/v1")
    Asker(endpoint)  # which needs no key
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file: expected a folder"):
        Asker(endpoint, tmp_path / "file")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(
        InputError, match=r"needs the openai package: `pip install 'tclib\[judge\]'"
    ):
        Asker(endpoint)


@pytest.mark.parametrize(
    "url",
    ["x", "ftp://h/v1", "http://", "http://me:hush@h/v1", "http://h/v1?key=hush", "http://h:x/"],
)
def test_an_address_that_is_none_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InputError, match="^base_url: expected http://") as caught:
        Asker(Endpoint(model="m", base_url=url), api_key=KEY)
    assert "hush" not in str(caught.value)


# -- texts and questions -----------------------------------------------------------------------


def coloured(n: int = 40) -> Contexts:
    """The feature is active on "red", and too weakly on "and"."""
    active, silent = [], []
    for i in range(n):
        before = ("The", *[f" w{i}"] * (i % 4))
        tokens = (*before, " red", " hat", " and", " shoe", ".")
        acts = (*[0.0] * len(before), 1.0, 0.0, 0.2, 0.0, 0.0)
        active.append(Context(tokens, acts))
        silent.append(Context(("The", f" w{i}", " blue", " hat", "."), (0.0,) * 5))
    return Contexts(tuple(active), tuple(silent))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_context_shows_its_active_tokens() -> None:
    context = coloured().active[0]
    assert context.active == (1,) and context.text(context.active) == "The <<red>> hat and shoe."
    assert context.text((1, 2, 5)) == "The <<red hat>> and shoe<<.>>"
    assert example_line(context) == "The <<red>> hat and shoe.  (activations: 'red' 10)"


def test_contexts_are_cut_at_bos_and_sorted_by_strength() -> None:
    lm = tiny_lm("gpt2")
    rows = torch.tensor([[0, 5, 6, 7, 8, 9, 0, 5, 6, 7], [0, 5, 5, 5, 5, 5, 5, 5, 5, 5]])
    acts = torch.zeros(2, 10)
    acts[0, 0], acts[0, 3], acts[1, 2], acts[1, 6] = 9.0, 1.0, 2.0, 0.1
    found = contexts(lm, rows, acts, 5)
    assert [c.acts for c in found.active] == [(0, 1, 0, 0, 0), (0, 0, 0.5, 0, 0)]
    assert found.silent == ()  # the weak one is neither, and three tokens are too few
    with pytest.raises(InputError, match="never fires on these rows"):
        contexts(lm, rows, torch.zeros(2, 10))
    with unchecked_types(), pytest.raises(InputError, match="one activation a token"):
        contexts(lm, rows, torch.zeros(2, 9))


def test_questions_are_balanced_shuffled_and_the_same_for_one_seed() -> None:
    found = coloured()
    items = detection_items(found, 20, seeded())
    assert [item.holds for item in items].count(True) == 10 and list(items) != sorted(items)
    assert all(("red" in item.text) == item.holds and "<<" not in item.text for item in items)
    assert items == detection_items(found, 20, seeded()) != detection_items(found, 20, seeded(1))
    fuzzed = fuzzing_items(found, 20, seeded())
    assert all(("<<red>>" in item.text) == item.holds for item in fuzzed)
    assert all(item.text.count("<<") == 1 and "<<and>>" not in item.text for item in fuzzed)
    trials = intruder_trials(found, 30, 4, seeded())
    assert {trial.intruder for trial in trials} == set(range(5))
    assert all("blue" in trial.texts[trial.intruder].replace("<", "") for trial in trials)
    assert all(text.count("<<") == 1 for trial in trials for text in trial.texts)
    assert len(examples(found, 10)) == 10 and examples(found, 1) == (found.active[0],)


def test_too_few_contexts_are_said() -> None:
    with pytest.raises(InputError, match="41 active contexts asked for, but there are 40"):
        detection_items(coloured(), 82, seeded())
    with pytest.raises(InputError, match="3 contexts to judge: expected an even number"):
        fuzzing_items(coloured(), 3, seeded())


# -- judges ------------------------------------------------------------------------------------


def texts_of(user: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", user, re.M)


def perfect(user: str) -> str:
    """Knows colours."""
    colour = (re.findall("Feature: the colour (\\w+)", user) or ["red"])[0]
    if "odd one out" in user:
        return str([f"<<{colour}>>" in text for text in texts_of(user)].index(False) + 1)
    if "Feature" not in user:
        return "\n Explanation: the colour red\nor so"
    mark = f"<<{colour}>>" if "marked tokens" in user else colour
    return f"[{', '.join(str(int(mark in text)) for text in texts_of(user))}]"


def random_judge(user: str) -> str:
    generator = seeded(int(hashlib.sha256(user.encode()).hexdigest()[:12], 16))
    n = len(texts_of(user))
    if "odd one out" in user:
        return f"[{int(torch.randint(n, (1,), generator=generator)) + 1}]"
    return str(torch.randint(2, (n,), generator=generator).tolist())


def test_a_perfect_judge_is_right(server: Server, tmp_path: Path) -> None:
    server.rule = perfect
    judge, found = Judge(server.asker(tmp_path)), coloured()
    explanation = judge.explain(examples(found, 5))
    assert explanation == "the colour red"
    detected = judge.judge("detection", explanation, detection_items(found, 40, seeded()))
    fuzzed = judge.judge("fuzzing", explanation, fuzzing_items(found, 38, seeded()))
    intruders = judge.find_intruders(intruder_trials(found, 20, 4, seeded()))
    assert detected == Judged(20, 20, 20, 20) and fuzzed == Judged(19, 19, 19, 19)
    assert intruders == Found(20, 20, 0.2)
    assert detected.accuracy == 1.0 and detected.interval[0] > 0.85
    wrong = judge.judge("detection", "the colour green", detection_items(found, 40, seeded()))
    assert wrong.accuracy == 0.5


def test_a_random_judge_is_at_chance(server: Server) -> None:
    server.rule = random_judge
    judge, found = Judge(server.asker()), coloured(200)
    detected = judge.judge("detection", None, detection_items(found, 200, seeded()))
    intruders = judge.find_intruders(intruder_trials(found, 100, 4, seeded()))
    assert 0.4 < detected.accuracy < 0.6 and 0.08 < intruders.accuracy < 0.32


def test_what_cannot_be_read_is_neither_right_nor_wrong(server: Server) -> None:
    server.rule = lambda user: "I think so" if "w3" in user else perfect(user)
    judge, found = Judge(server.asker(), n_shown=1), coloured()
    detected = judge.judge("detection", "the colour red", detection_items(found, 80, seeded()))
    assert detected.accuracy == 1.0 and detected.n_unparsed > 0
    assert detected.n + detected.n_without + detected.n_unparsed == 80
    server.rule = lambda _: ""
    assert judge.explain(found.active[:2]) is None
    lost = judge.find_intruders(intruder_trials(found, 3, 2, seeded()))
    assert lost.n == 0 and lost.n_unparsed == 3 and lost.interval == (0.0, 1.0)
    assert Judged(n_unparsed=5).interval == (0.0, 1.0)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("Labels: [0,0,0] no: [1 0 1].", [True, False, True]),
        ("1, 0, 1.", [True, False, True]),
        ("1\n0\n1\n", [True, False, True]),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ("[[]]", None),
        ("yes, no, yes", None),
        ("1. Yes\n2. no\n3) YES.", [True, False, True]),
        ("1. Yes\n2. no", None),
        ("1. Yes\n3. no\n2. no", None),
        ("1. Yes\n2. perhaps\n3. no", None),
        ("", None),
    ],
)
def test_lists_are_read(said: str, read: list[bool] | None) -> None:
    assert parse_list(said, 3) == read


@pytest.mark.parametrize(
    ("said", "read"),
    [("[2]", 1), ("3", 2), ("Text 3.", 2), ("[1] or [3]", 2), ("1 or 2", None), ("4", None)]
    + [("0", None), ("none", None), ("9" * 5_000, None)],
)  # fmt: skip
def test_numbers_are_read(said: str, read: int | None) -> None:
    assert parse_number(said, 3) == read


def test_judgements_are_pooled() -> None:
    pooled = Judged(1, 2, 3, 4) + Judged(1, 2, 1, 4, 5)
    assert pooled == Judged(2, 4, 4, 8, 5) and pooled.accuracy == 0.5
    assert Found(1, 2, 0.5) + Found(1, 3, 0.5, 1) == Found(2, 5, 0.5, 1)
    with pytest.raises(InputError, match="expected one number of texts"):
        _ = Found(1, 2, 0.5) + Found(1, 2, 0.25)


# -- validation --------------------------------------------------------------------------------


class Knowing:
    """Answers from the demo world's truth, or by a rule."""

    def __init__(self, lm: LanguageModel, labelled: LabelledRows) -> None:
        self.lm, self.labelled = lm, labelled
        self.codes = {latent_in_words(name): i for i, name in enumerate(labelled.names)}
        self.known: dict[str, set[str]] = {}

    def ask(self, prompt: Prompt) -> str:
        explanation = re.findall("Feature: (.*)\n", prompt.user)
        if not explanation or explanation[0] not in self.codes:
            return random_judge(prompt.user)
        name = explanation[0]
        if name not in self.known:
            marked = (self.labelled.label == self.codes[name]).float()
            active = contexts(self.lm, self.labelled.rows, marked).active
            self.known[name] = {c.text() for c in active} | {c.text(c.active) for c in active}
        return str([int(text in self.known[name]) for text in texts_of(prompt.user)])


class Random:
    def ask(self, prompt: Prompt) -> str:
        return random_judge(prompt.user)


class Silent:
    def ask(self, prompt: Prompt) -> str:
        return "I would rather not say."


@pytest.fixture(scope="module")
def world() -> tuple[LanguageModel, LabelledRows]:
    lm = LanguageModel.load("demo")
    return lm, labelled_rows(lm, 128, 64, 0)


def test_a_judge_that_knows_is_told_from_one_that_guesses(
    world: tuple[LanguageModel, LabelledRows],
) -> None:
    found = validate_judge(Judge(Knowing(*world)), *world, seeded(), 4, 8, 3)
    table = found.table.set_index(["explanation", "task"])
    for distinguished, task in zip(found.distinctions, ("detection", "fuzzing"), strict=True):
        assert distinguished.tells and distinguished.task == task
        assert table.loc[("true", task), "accuracy"] == 1.0
        assert table.loc[("wrong", task), "accuracy"] <= 0.5  # less: it knows that latent too
        assert "1.00 with true" in str(distinguished) and "tells these" in str(distinguished)
    assert table.loc[("none", "intruder"), "chance"] == pytest.approx(0.2)
    assert len(found.by_latent) == 4 * 7 and len(found.by_latent["latent"].unique()) == 4
    for guesser in (Random(), Silent()):
        found = validate_judge(Judge(guesser), *world, seeded(), 4, 8, 3)
        assert not any(distinguished.tells for distinguished in found.distinctions)
        assert all("cannot tell these apart" in str(one) for one in found.distinctions)
    assert (found.table["n"] == 0).all() and (found.table["n_unparsed"] > 0).all()


def test_too_much_asked_of_the_world_is_said(world: tuple[LanguageModel, LabelledRows]) -> None:
    judge = Judge(Silent())
    with pytest.raises(InputError, match="n_latents 2: expected at least 3"):
        validate_judge(judge, *world, seeded(), 2)
    with pytest.raises(InputError, match="7 contexts to judge: expected an even number"):
        validate_judge(judge, *world, seeded(), 4, 7)
    with pytest.raises(InputError, match="99 latents asked for, but .* ask for fewer"):
        validate_judge(judge, *world, seeded(), 99, 4_000)


def test_the_rule_asks_for_a_difference_over_latents_and_over_answers() -> None:
    def rule(true: list[float], n: int, n_unparsed: int = 0) -> bool:
        each = [
            {"latent": i, "task": "fuzzing", "explanation": kind, "accuracy": accuracy}
            for kind, all_of in (("true", true), ("wrong", [0.5] * len(true)))
            for i, accuracy in enumerate(all_of)
        ]
        pooled = []
        for kind, accuracy in (("true", sum(true) / len(true)), ("wrong", 0.5)):
            right = round(accuracy * n)
            low, high = Judged(right, n, right, n).interval
            line = {"low": low, "high": high, "n": 2 * n, "n_unparsed": n_unparsed}
            pooled.append({"task": "fuzzing", "explanation": kind, "accuracy": right / n, **line})
        return distinction("fuzzing", pd.DataFrame(pooled), pd.DataFrame(each)).tells

    assert rule([0.9, 1.0, 0.9, 1.0], 40)
    assert not rule([0.9, 1.0, 0.9, 1.0], 2)  # too few answers
    assert not rule([1.0, 0.5, 0.5, 1.0], 400)  # of half of the latents
    assert not rule([0.9, 1.0], 400)  # too few latents
    assert not rule([0.9, 1.0, 0.9, 1.0], 40, 81)  # most could not be read


def test_a_feature_is_explained_on_one_text_and_scored_on_another() -> None:
    lm, dictionary = tiny_lm("gpt2"), random_transcoder(1, "relu", torch.float32)
    rows = torch.randint(2, 100, (400, 4), generator=seeded())
    texts, judge = (rows[:200], rows[200:]), Judge(Random())
    fires = (feature_activations(lm, dictionary, range(40), rows) > 0).any(2).float().mean(1)
    feature = int((fires - 0.7).abs().argmin())  # in most contexts, but not in all
    line = judge_feature(lm, dictionary, feature, texts, judge, Asked(4, 2), seeded())
    assert line["left_out"] == "" and line["explanation"]
    assert line["detection_n"] == line["fuzzing_n"] == 4 and line["intruder_n"] == 2
    line = judge_feature(lm, dictionary, feature, texts, judge, Asked(1000, 0), seeded())
    assert "contexts asked for, but there are" in line["left_out"]
