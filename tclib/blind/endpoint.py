"""A model behind an OpenAI-compatible endpoint: asked with bounded patience, and never twice for the same.

Every answer is a file of its own, named by the hash of model, prompt and parameters, on disk before the next
question is asked: a run that was killed asks only what it has not asked. The key goes to the client and nowhere
else: no file, sentence or repr holds it.
"""

from __future__ import annotations

import datetime
import email.utils
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

from tclib.support.declared import Count, Name, Natural, NonNegative, Positive, declared, parse
from tclib.support.errors import InputError
from tclib.support.files import new_file
from tclib.support.foreign import parse_json, read_json
from tclib.support.paths import check_folder, expanded

OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "none"  # what a server of one's own is sent
FORMAT = "tclib-answer-2"
RETRIED = {408, 409, 425, 429}  # and every status from 500 on
FIRST_WAIT, MAX_WAIT = 1.0, 120.0  # seconds
MAX_ANSWER = 10_000  # characters that are kept of an answer
INSTALL = "`pip install 'tclib[judge]'`, or `pip install openai`"


class Prompt(NamedTuple):
    """What a model is asked, and how many tokens it may answer with."""

    system: str
    user: str
    max_tokens: int


@runtime_checkable
class Asks(Protocol):
    """Whatever answers prompts."""

    def ask(self, prompt: Prompt) -> str:
        """The answer to a prompt."""


@declared(frozen=True, kw_only=True)
class Endpoint:
    """Where a model is asked, and with what patience."""

    model: Name
    """Name of the model, as the server knows it."""
    base_url: Name = OPENAI_URL
    """Where the server is, with /v1."""
    timeout: Positive = 120.0
    """Seconds until a request counts as lost."""
    n_tries: Count = 6
    """How often a request is sent at most; between two, the wait doubles from a second on."""
    price_in: NonNegative | None = None
    """Price of a million tokens of prompts."""
    price_out: NonNegative | None = None
    """Price of a million tokens of answers."""


def endpoint_from_environment(
    model: str | None = None, base_url: str | None = None, **values: Any
) -> Endpoint:
    """An endpoint by TCLIB_JUDGE_MODEL and OPENAI_BASE_URL, where an argument does not say it.

    Errors: `InputError` if neither names a model, or a value is out of range.
    """
    model = model or os.environ.get("TCLIB_JUDGE_MODEL")
    if not model:
        raise InputError(
            "no judge is named: set TCLIB_JUDGE_MODEL (and OPENAI_BASE_URL, OPENAI_API_KEY), or give the model"
        )
    url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    return Endpoint(model=model, base_url=url, **values)


class Answer(NamedTuple):
    """What came back; tokens are None where the server did not count them."""

    text: str
    n_prompt_tokens: int | None
    n_answer_tokens: int | None


@declared(frozen=True)
class _Kept:
    """What an answer's file holds."""

    format: Literal["tclib-answer-2"]
    hash: str  # of the question
    model: str
    text: str
    text_hash: str
    n_prompt_tokens: Natural | None
    n_answer_tokens: Natural | None


@dataclass
class Usage:
    """What has been asked so far, and what of it came from the disk."""

    n_asked: int = 0
    n_from_cache: int = 0
    n_prompt_tokens: int = 0
    n_answer_tokens: int = 0
    n_uncounted: int = 0  # answers whose tokens the server did not count

    def take(self, answer: Answer) -> None:
        """Count an answer that was asked for."""
        self.n_asked += 1
        if answer.n_prompt_tokens is None or answer.n_answer_tokens is None:
            self.n_uncounted += 1
        self.n_prompt_tokens += answer.n_prompt_tokens or 0
        self.n_answer_tokens += answer.n_answer_tokens or 0

    def cost(self, endpoint: Endpoint) -> float | None:
        """What the answers that were asked for cost; None unless both prices and all tokens are known."""
        if endpoint.price_in is None or endpoint.price_out is None or self.n_uncounted:
            return None
        tokens = (
            endpoint.price_in * self.n_prompt_tokens + endpoint.price_out * self.n_answer_tokens
        )
        return tokens / 1e6

    def in_words(self, endpoint: Endpoint) -> str:
        """One line: questions, tokens, cost."""
        cost = self.cost(endpoint)
        uncounted = f" and {self.n_uncounted} answers uncounted" if self.n_uncounted else ""
        return (
            f"{self.n_asked} questions asked, {self.n_from_cache} answered from the cache; "
            f"{self.n_prompt_tokens:,} tokens in, {self.n_answer_tokens:,} out{uncounted}; "
            f"cost {'unknown' if cost is None else f'{cost:.4f}'}"
        )


@dataclass(frozen=True)
class _Fault:
    """A request that failed: what happened, in whose words, what to do, and when the server says to try again.

    No exception: those of the client hold the request, whose headers hold the key.
    """

    said: str
    is_passing: bool
    reason: str = ""
    advice: str = "see that the server runs, and run it again"
    wait: float | None = None


class Asker:
    """Asks a model, and keeps every answer.

    Args:
        endpoint: which model, where, and how patiently.
        cache: folder for the answers, which are found again whatever the server's address; none by default.
        api_key: by default OPENAI_API_KEY; a server of one's own may need none.
        show: called with every prompt and answer, as text.
        sleep: waits that many seconds between two tries.

    Errors: `InputError` if `openai` is not installed, for an address that is none or holds a password, or if
    OpenAI itself is to be asked without a key.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        cache: str | Path | None = None,
        api_key: str | None = None,
        show: Callable[[str], object] | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        _check_url(endpoint.base_url)
        key = _checked_key(api_key, endpoint)
        self.endpoint, self.usage = endpoint, Usage()
        self._cache = None if cache is None else expanded(cache)
        if self._cache is not None:
            check_folder(self._cache)
        self._show, self._sleep = show, sleep
        self._create = _client(endpoint, key)
        self._without_key = lambda text: text.replace(key, "(key)") if len(key) >= 8 else text

    def __repr__(self) -> str:
        return f"Asker({self.endpoint.model!r} at {self.endpoint.base_url})"

    def __reduce_ex__(self, _protocol: object) -> Any:
        raise InputError("an Asker holds a key: it is not pickled or copied; make another")

    def ask(self, prompt: Prompt) -> str:
        """The answer, from the disk if it is there.

        Errors: `InputError` if the server refuses, or cannot be had in as many tries as the endpoint allows.
        """
        digest = _hash(self.endpoint.model, _request(prompt))
        path = None if self._cache is None else self._cache / f"{digest}.json"
        answer = None if path is None else _kept_answer(path, digest)
        if answer is None:
            answer = self._asked(prompt)
            self.usage.take(answer)
            if path is not None:
                kept = {"format": FORMAT, "hash": digest, "model": self.endpoint.model}
                kept["text_hash"] = _text_hash(answer.text)
                with new_file(path) as temporary:
                    held = json.dumps({**kept, **answer._asdict()}, ensure_ascii=False)
                    temporary.write_text(held, encoding="utf-8")
        else:
            self.usage.n_from_cache += 1
        if self._show is not None:
            self._show(f"{prompt.system}\n\n{prompt.user}\n\n→ {answer.text}\n")
        return answer.text

    def _asked(self, prompt: Prompt) -> Answer:
        """Ask the server, as often as is allowed. Errors: `InputError` after the last time."""
        wait, fault = FIRST_WAIT, _Fault("not asked", False)
        for n_tried in range(1, self.endpoint.n_tries + 1):
            found = self._asked_once(prompt)
            if isinstance(found, Answer):
                return found._replace(text=self._without_key(found.text))
            fault = found
            is_last = n_tried == self.endpoint.n_tries or (fault.wait or 0) > MAX_WAIT
            if is_last or not fault.is_passing:
                break
            self._sleep(min(wait if fault.wait is None else fault.wait, MAX_WAIT))
            wait *= 2
        reason = " ".join(self._without_key(fault.reason).split())[:200]
        said = f"{fault.said} ({reason})" if reason else fault.said
        if n_tried > 1:
            said += f", after {n_tried} tries"
        kept = "; what it has answered is kept" if self._cache is not None else ""
        raise InputError(f"{self!r}: {said}: {fault.advice}{kept}")

    def _asked_once(self, prompt: Prompt) -> Answer | _Fault:
        """Ask the server once."""
        import openai

        try:
            text = self._create(model=self.endpoint.model, **_request(prompt)).text
        except openai.APITimeoutError:
            return _Fault(f"no answer within {self.endpoint.timeout:g} s", True)
        except openai.APIConnectionError as error:
            return _Fault("the connection failed", True, str(error.__cause__ or error))
        except openai.APIStatusError as error:
            return _refusal(error)
        except (openai.OpenAIError, ValueError) as error:
            return _Fault(f"the request failed ({type(error).__name__})", False)
        return _answer_of(text)


def _check_url(url: str) -> None:
    """Raise `InputError`, which does not repeat it, unless `url` is one of a server, without a password."""
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_bare = "@" not in parts.netloc and not parts.query and (parts.port or 1) > 0
    except ValueError:
        is_usable = is_bare = False
    if not (is_usable and is_bare):
        raise InputError(
            "base_url: expected http:// or https://, a host and a path, without user, password or query, as "
            f"{OPENAI_URL}; the key goes into OPENAI_API_KEY"
        )


def _checked_key(api_key: Any, endpoint: Endpoint) -> str:
    """The key, without white space around it. Errors: `InputError`, which does not repeat it."""
    key = os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key
    if not isinstance(key, str) or not key.strip().isascii() or not key.strip().isprintable():
        raise InputError("the key (api_key, OPENAI_API_KEY): expected printable ASCII characters")
    if not key.strip() and endpoint.base_url == OPENAI_URL:
        raise InputError(
            f"{OPENAI_URL} needs a key: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own"
        )
    return key.strip() or NO_KEY


def _client(endpoint: Endpoint, key: str) -> Callable[..., Any]:
    """What sends one request, and does not retry. Errors: `InputError` if `openai` is not installed."""
    try:
        import openai
    except ImportError:
        raise InputError(f"a judge needs the openai package: {INSTALL}") from None
    client = openai.OpenAI(
        api_key=key, base_url=endpoint.base_url, timeout=endpoint.timeout, max_retries=0
    )
    create: Callable[..., Any] = client.chat.completions.with_raw_response.create
    return create


def _request(prompt: Prompt) -> dict[str, Any]:
    """Prompt and parameters as they are sent."""
    said = (("system", prompt.system), ("user", prompt.user))
    messages = [{"role": role, "content": content} for role, content in said]
    return {"messages": messages, "temperature": 0.0, "max_tokens": prompt.max_tokens}


def _hash(model: str, request: Mapping[str, Any]) -> str:
    held = json.dumps({"model": model, **request}, sort_keys=True)
    return hashlib.sha256(held.encode()).hexdigest()


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _kept_answer(path: Path, digest: str) -> Answer | None:
    """An answer that is on disk; a damaged one is named, and counts as none."""
    if not path.exists():
        return None
    try:
        kept = parse(_Kept, read_json(path), f"{path} is no answer")
        if kept.hash != digest:
            raise InputError(f"{path} holds the answer to another question")
        if kept.text_hash != _text_hash(kept.text):
            raise InputError(f"{path} holds an answer that was changed since")
    except InputError as error:
        warnings.warn(f"{error}: it is asked again", stacklevel=3)
        return None
    return Answer(kept.text, kept.n_prompt_tokens, kept.n_answer_tokens)


def _refusal(error: Any) -> _Fault:
    """A status that is no success: 429 and 5xx pass, others do not."""
    status = int(error.status_code)
    if status in (401, 403):  # whose text may repeat a part of the key
        return _Fault(f"the key is refused (status {status})", False, advice="set OPENAI_API_KEY")
    body = error.body if isinstance(error.body, dict) else {}
    reason = str(body.get("message") or body.get("detail") or "")
    if status in RETRIED or status >= 500:
        wait = _retry_after(error.response.headers.get("retry-after"))
        return _Fault(f"status {status}", True, reason, wait=wait)
    return _Fault(f"status {status}", False, reason, "check the model's name and the address")


def _retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait: a number, or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            then = email.utils.parsedate_to_datetime(header)
        except ValueError:
            return None
        zone = then.tzinfo or datetime.UTC
        now = datetime.datetime.now(datetime.UTC)
        seconds = (then.replace(tzinfo=zone) - now).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _answer_of(text: str) -> Answer | _Fault:
    """What a chat completion says; anything else is a fault, which may pass."""
    try:
        held = parse_json(text, Path("the answer"))
        said = held["choices"][0]["message"]["content"]
        usage = held.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (InputError, KeyError, IndexError, TypeError, AttributeError):
        return _Fault("the answer is no chat completion in JSON", True)
    if not (said is None or isinstance(said, str)):
        return _Fault("the answer is no text", True)
    n_in, n_out = (n if type(n) is int and n >= 0 else None for n in counts)
    # Half a surrogate pair, which JSON can hold, cannot be written.
    whole = (said or "")[:MAX_ANSWER].encode("utf-8", "replace").decode("utf-8")
    return Answer(whole, n_in, n_out)
