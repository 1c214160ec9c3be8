"""What sessions keep apart from themselves, and the one way by which an answer comes out and into the ledger."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from jaxtyping import Float, Int
from torch import Tensor

from tclib.blind.ledger import BlindnessError, Entry, Position, next_entry, plain
from tclib.circuits.frozen import FrozenPrompts
from tclib.dictionaries.dictionary import Dictionary
from tclib.features.from_weights import LoneTokens
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.errors import InputError

if TYPE_CHECKING:
    from tclib.blind.session import BlindSession


@dataclass
class Secret:
    """What nobody but a session touches while it is blind."""

    lm: LanguageModel
    transcoders: dict[int, Dictionary]
    studied: Dictionary
    rows: Int[Tensor, "example pos"]  # in the order of the examples' numbers
    acts: Float[Tensor, "example pos"]
    lone: LoneTokens
    subject: dict[str, Any]
    key: str
    identity: str
    is_blind: bool = True
    is_unblinded: bool = False  # by this session; another may have been before it
    has_hypothesis: bool = False
    ledger: list[Entry] = field(default_factory=list)
    frozen: dict[Position, FrozenPrompts] = field(default_factory=dict)


# Kept apart from the sessions, so that nothing that walks over a session's attributes finds it.
SECRETS: WeakKeyDictionary[BlindSession, Secret] = WeakKeyDictionary()
SEEN: set[str] = set()  # features with a corpus that this process has unblinded
_QUESTIONS: set[str] = set()
OWN: Any = None  # the layer or the feature under study

_Asked = ParamSpec("_Asked")
_Answer = TypeVar("_Answer")


def question(
    method: Callable[Concatenate[BlindSession, _Asked], _Answer],
) -> Callable[Concatenate[BlindSession, _Asked], _Answer]:
    """A method whose every answer goes into the ledger, with all arguments, defaults filled in."""
    signature = inspect.signature(method)

    @wraps(method)
    def asked(session: BlindSession, /, *args: _Asked.args, **kwargs: _Asked.kwargs) -> _Answer:
        bound = signature.bind(session, *args, **kwargs)
        bound.apply_defaults()
        arguments = {name: bound.arguments[name] for name in list(bound.arguments)[1:]}
        for name in ("layer", "feature"):
            if name in arguments and arguments[name] is OWN:
                bound.arguments[name] = arguments[name] = getattr(session, name)
        answer = _without_frames(method, *bound.args, **bound.kwargs)
        if "position" in arguments:
            arguments = {**vars(arguments.pop("position")), **arguments}
        if arguments.get("head") is not None:
            arguments["head"] = list(arguments["head"])
        record(session, "question", method.__name__, arguments, plain(answer))
        return answer

    _QUESTIONS.add(method.__name__)
    return checked(asked)


def _without_frames(method: Callable[..., _Answer], *args: Any, **kwargs: Any) -> _Answer:
    """The method's answer, or its error without the frames in which the corpus lies."""
    problem: BaseException
    try:
        return method(*args, **kwargs)
    except InputError as error:
        problem = type(error)(str(error))
    except Exception as error:
        problem = BlindnessError(
            f"{method.__name__} failed inside ({type(error).__name__}): what it says could show the text; ask "
            "for less, or report it with a corpus of your own"
        )
    except BaseException as error:
        problem = type(error)()
    raise problem


def record(
    session: BlindSession, kind: str, question: str, arguments: dict[str, Any], answer: Any
) -> None:
    """The next entry of a session's ledger."""
    secret = SECRETS[session]
    secret.ledger.append(
        next_entry(secret.ledger, kind, secret.is_blind, question, arguments, answer)
    )


def is_question(name: str) -> bool:
    """Whether a session has a question of this name."""
    return name in _QUESTIONS
