"""What sessions keep apart from themselves, and the one way by which an answer comes out and into the ledger."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, get_type_hints
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.blind.ledger import BlindnessError, Entry, Position, next_entry, plain
from tclib.circuits.frozen import FrozenPrompts
from tclib.dictionaries.dictionary import Dictionary
from tclib.features.examples import feature_activations
from tclib.features.from_weights import LoneTokens
from tclib.models.checks import check_hooks
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.errors import InputError
from tclib.support.files import tensors_hash

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
    fresh_eyes: bool
    hashes: dict[str, str]  # of the dictionaries
    is_unblinded: bool = False  # by this session; another may have been before it
    has_hypothesis: bool = False
    ledger: list[Entry] = field(default_factory=list)
    frozen: dict[Position, FrozenPrompts] = field(default_factory=dict)
    met: set[tuple[Position, int, int]] = field(
        default_factory=set
    )  # features listed at a position

    @property
    def own(self) -> tuple[int, int]:
        """Layer and feature under study."""
        return int(self.subject["layer"]), int(self.subject["feature"])

    @property
    def restricted(self) -> bool:
        """Whether input-dependent facts about layer 0's features are refused."""
        return bool(self.subject["restricted"])

    @property
    def is_blind(self) -> bool:
        """Whether the feature is unseen: here, and for whoever remembers, in any session of this process."""
        return not self.is_unblinded and (self.fresh_eyes or not was_seen(self))

    def at(self, position: Position) -> FrozenPrompts:
        """The frozen prompt up to a position."""
        if position not in self.frozen:
            check_hooks(self.lm.model, self.lm.name)
            tokens = self.rows[[position.example], : position.pos + 1].long()
            self.frozen[position] = FrozenPrompts(self.lm, tokens, self.transcoders.values())
        return self.frozen[position]


# Kept apart from the sessions, so that nothing that walks over a session's attributes finds it.
SECRETS: WeakKeyDictionary[BlindSession, Secret] = WeakKeyDictionary()
# Directions of features that this process has unblinded, whatever the corpus.
SEEN: list[tuple[str, int, Float[Tensor, "d_model"]]] = []
_QUESTIONS: set[str] = set()
OWN: Any = None  # the layer or the feature under study

_Asked = ParamSpec("_Asked")
_Answer = TypeVar("_Answer")


def _direction(secret: Secret) -> tuple[str, int, Float[Tensor, "d_model"]]:
    layer, feature = secret.own
    read = secret.studied.encoder_direction(feature).cpu()
    return secret.lm.known_hash, layer, read / read.norm()


def was_seen(secret: Secret) -> bool:
    """Whether this process has unblinded the feature, or one that reads nearly the same direction."""
    model, layer, read = _direction(secret)
    return any((model, layer) == (m, at) and float(read @ other) > 0.999 for m, at, other in SEEN)


def remember(secret: Secret) -> None:
    """Note that the feature has been unblinded."""
    SEEN.append(_direction(secret))


def dictionary_hashes(dictionaries: Mapping[str, Dictionary]) -> dict[str, str]:
    """Of each dictionary's weights; computed once for as long as none is edited."""
    found = {}
    for name, one in dictionaries.items():
        state = [(t.data_ptr(), t._version) for t in one.held()]
        if one not in _HASHES or _HASHES[one][0] != state:
            _HASHES[one] = (state, tensors_hash(one.parameters())[:16])
        found[name] = _HASHES[one][1]
    return found


_HASHES: WeakKeyDictionary[Dictionary, tuple[list[tuple[int, int]], str]] = WeakKeyDictionary()


def question(
    method: Callable[Concatenate[BlindSession, _Asked], _Answer],
) -> Callable[Concatenate[BlindSession, _Asked], _Answer]:
    """A method whose every answer goes into the ledger, with all arguments, defaults filled in."""
    signature = inspect.signature(method)

    @wraps(method)
    def asked(session: BlindSession, /, *args: _Asked.args, **kwargs: _Asked.kwargs) -> _Answer:
        _check_unedited(session)
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
    asked.__annotations__ = get_type_hints(method, include_extras=True)
    recorded = checked(asked)
    for made in (asked, recorded):  # by which the method could be had without its record
        made.__signature__ = signature  # type: ignore[attr-defined]
        del made.__wrapped__
    return recorded


def _check_unedited(session: BlindSession) -> None:
    secret = SECRETS[session]
    if dictionary_hashes(held_dictionaries(secret)) != secret.hashes:
        raise BlindnessError("a dictionary was edited since the session began: begin anew")


def held_dictionaries(secret: Secret) -> dict[str, Dictionary]:
    """The transcoders by layer, and the dictionary under study."""
    return {**{str(layer): one for layer, one in secret.transcoders.items()}, "own": secret.studied}


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


def check_own(
    acts: Float[Tensor, "row pos"],
    lm: LanguageModel,
    dictionary: Dictionary,
    feature: int,
    rows: Int[Tensor, "row pos"],
) -> None:
    """Raise `InputError` unless activations that are given are the feature's, as far as some rows show."""
    strongest = acts.amax(1).argsort(descending=True, stable=True)[:2]
    some = torch.cat([strongest, torch.linspace(0, len(rows) - 1, 2).long()]).unique()
    true = feature_activations(lm, dictionary, [feature], rows[some])[0]
    scale = max(float(true.abs().max()), 1e-6)
    if bool(acts[rows == lm.bos_id].any()) or float((acts[some] - true).abs().max()) > 1e-2 * scale:
        raise InputError(
            f"acts are not those of feature {feature} on these rows: expected feature_activations', or none"
        )


def studied_dictionary(
    lm: LanguageModel, transcoder: Dictionary, other: Dictionary | None
) -> Dictionary:
    """Whose feature is studied. Errors: `InputError` unless it reads what the layer's transcoder reads."""
    if other is None:
        return transcoder
    other.check_model(lm)
    if other.config.input_site != transcoder.config.input_site:
        raise InputError(
            f"dictionary on {other.config.input_site}: expected one that reads {transcoder.config.input_site}"
        )
    return other.to(lm.device, lm.dtype)
