"""The greater-than task: prompts, answer tokens and the two metrics (Section 5.2, Appendix G).

The paper's metric is the probability difference over the answer tokens alone, y the number in the prompt:

    softmax over answers,   Σ_{answer greater} p − Σ_{answer not greater} p

and beside it stands that of Hanna et al. (2023), with p from the softmax over the full vocabulary. Three
forms: two-digit years as one token (the paper's), the demo world's sentence, and one token a digit, where
the next digit counts as greater when it is at or above the tens digit of the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.declared import Count, Natural
from tclib.support.errors import InputError

PAPER_TEMPLATE = "The war lasted from 17{yy:02d} to 17"
DEMO_TEMPLATE = "The war lasted from the year 17{yy:02d} to the year 17"
YEARS = range(100)
SCORED_YEARS = range(1, 99)  # 01 to 98, as in the authors' code
Form = Literal["years", "digits"]


@dataclass(frozen=True)
class GreaterThan:
    """Prompts of one length, the number in each, and the answers among which the model chooses.

    `numbers` is the year YY of a prompt; `subject_pos` is where it stands (its tens digit, in the
    digit form) and `template_idx` which sentence it is in. `left_out` names the years that a template
    or the answers cannot use, and why; `misfits` are the first sentence's prompts among them (GPT-2's
    " 1700" is one token), which the paper's ranking counts. `is_greater` marks the right answers of each
    prompt.
    """

    form: Form
    tokens: Int[Tensor, "prompt pos"]
    numbers: tuple[int, ...]
    template_idx: tuple[int, ...]
    subject_pos: int
    answer_ids: Int[Tensor, "answer"]
    answers: tuple[int, ...]
    is_greater: Bool[Tensor, "prompt answer"]
    left_out: Mapping[str, str] = field(default_factory=dict)
    misfits: tuple[Int[Tensor, "1 _"], ...] = ()

    @classmethod
    @checked
    def of(
        cls,
        lm: LanguageModel,
        template: str | Sequence[str] = DEMO_TEMPLATE,
        form: Form | None = None,
    ) -> GreaterThan:
        """Prompts of one or several templates, in which `{yy:02d}` is the year.

        By default the form is the one that the vocabulary has: two-digit years if every one is a
        token, else single digits. Errors: `InputError` if neither is there, for templates of which
        no year can be used, or whose prompts differ in length.
        """
        templates = [template] if isinstance(template, str) else list(template)
        check_templates(templates)
        context = templates[0].format(yy=YEARS[len(YEARS) // 2])
        chosen = form or _form_of(lm, context)
        answers, left_out = _answers(lm, chosen, context)
        prompts, missing, misfits = _prompts(lm, templates, chosen)
        left_out |= missing
        numbers = torch.tensor([prompt.number for prompt in prompts])[:, None]
        values = torch.tensor(list(answers))[None]
        is_greater = values > numbers if chosen == "years" else values >= numbers // 10
        return cls(
            form=chosen,
            tokens=torch.cat([prompt.tokens for prompt in prompts]),
            numbers=tuple(prompt.number for prompt in prompts),
            template_idx=tuple(prompt.template_idx for prompt in prompts),
            subject_pos=prompts[0].subject_pos,
            answer_ids=torch.tensor(list(answers.values()), device=lm.device),
            answers=tuple(answers),
            is_greater=is_greater.to(lm.device),
            left_out=left_out,
            misfits=misfits,
        )

    @property
    def is_scored(self) -> Bool[Tensor, "prompt"]:
        """Prompts that count: 01 to 98 as in the authors' code, and an answer on either side."""
        both = self.is_greater.any(1) & ~self.is_greater.all(1)
        inside = [number in SCORED_YEARS for number in self.numbers]
        return both & torch.tensor(inside, device=both.device)

    def scored(self) -> GreaterThan:
        """The task on the prompts that count."""
        return self.subset(self.is_scored.nonzero()[:, 0].tolist())

    @checked
    def subset(self, prompts: Sequence[Natural]) -> GreaterThan:
        """The task on some of its prompts. Errors: `InputError` for one that is not there."""
        if prompts and max(prompts) >= len(self.numbers):
            raise InputError(f"prompts {prompts}: expected 0 to {len(self.numbers) - 1}")
        index = torch.tensor(list(prompts), device=self.tokens.device)
        return replace(
            self,
            tokens=self.tokens[index],
            numbers=tuple(self.numbers[i] for i in prompts),
            template_idx=tuple(self.template_idx[i] for i in prompts),
            is_greater=self.is_greater[index.to(self.is_greater.device)],
        )

    @checked
    def every(self, step: Count) -> GreaterThan:
        """The task on every `step`-th of its prompts."""
        return self.subset(range(0, len(self.numbers), step))

    @checked
    def prompt_index(self, number: int, template_idx: int = 0) -> int:
        """Which prompt asks about `number`. Errors: `InputError` if it was left out."""
        prompts = list(zip(self.numbers, self.template_idx, strict=True))
        if (number, template_idx) not in prompts:
            raise InputError(
                f"no prompt for {number:02d} in template {template_idx}: left out, or no year"
            )
        return prompts.index((number, template_idx))

    def root_weights(self, number: int) -> dict[int, float]:
        """The mean logit of the greater answers minus the mean of the others, by token id.

        Errors: `InputError` for a number that was left out, or after which nothing comes.
        """
        greater = self.is_greater[self.prompt_index(number)].tolist()
        n_greater, n_others = sum(greater), len(greater) - sum(greater)
        if not (n_greater and n_others):
            raise InputError(f"{number:02d}: expected a number with answers on either side")
        pairs = zip(self.answer_ids.tolist(), greater, strict=True)
        return {i: 1 / n_greater if right else -1 / n_others for i, right in pairs}

    # -- metrics ----------------------------------------------------------------------------

    def answer_probabilities(
        self, logits: Float[Tensor, "*batch d_vocab"]
    ) -> Float[Tensor, "*batch answer"]:
        """Softmax over the answers, of next-token logits at the last position."""
        return logits[..., self.answer_ids].float().softmax(-1)

    def differences(
        self, probabilities: Float[Tensor, "*batch prompt answer"]
    ) -> Float[Tensor, "*batch prompt"]:
        """Σ greater − Σ not greater, for every prompt (any leading batch of such tables)."""
        sign = self.is_greater.to(probabilities) * 2 - 1
        return (probabilities * sign).sum(-1)


def check_templates(templates: Sequence[str]) -> None:
    """Raise `InputError` for no template, or one that is the same sentence in every year."""
    for template in templates or ("",):
        if not _has_year(template):
            raise InputError(
                f"templates {template!r}: expected a sentence with {{yy:02d}} for the year"
            )


def _has_year(template: str) -> bool:
    try:
        return template.format(yy=17) != template.format(yy=35)
    except (LookupError, ValueError, TypeError, AttributeError):  # what str.format may raise
        return False


class _Prompt(NamedTuple):
    number: int
    template_idx: int
    tokens: Int[Tensor, "1 pos"]
    subject_pos: int


def _form_of(lm: LanguageModel, context: str) -> Form:
    n_years = len(_answer_ids(lm, context, _YEAR_NAMES))
    if n_years == len(YEARS):
        return "years"
    if len(_answer_ids(lm, context, _DIGIT_NAMES)) == 10:
        return "digits"
    raise InputError(
        f"{lm.name} has {n_years} of the tokens '00' to '99' after {context!r} and not all of '0' to '9': greater-than "
        "needs one or the other; give form='years' to leave out what is missing"
    )


_YEAR_NAMES = {year: f"{year:02d}" for year in YEARS}
_DIGIT_NAMES = {digit: str(digit) for digit in range(10)}


def _answers(lm: LanguageModel, form: Form, context: str) -> tuple[dict[int, int], dict[str, str]]:
    """Token ids by answer, and the answers that are no single token behind the context."""
    names = _YEAR_NAMES if form == "years" else _DIGIT_NAMES
    found = _answer_ids(lm, context, names)
    if len(found) < 2:
        raise InputError(
            f"{lm.name} has {len(found)} single-token answers of form {form!r} after {context!r}: "
            "expected 2 or more"
        )
    missing = {f"answer {name}": "no single token" for v, name in names.items() if v not in found}
    return found, missing


def _answer_ids(lm: LanguageModel, context: str, names: Mapping[int, str]) -> dict[int, int]:
    """The token that each name becomes behind the context, where it becomes exactly one.

    Where most names do, a name that merges with the context there (" 1776" may be one token) is still
    an answer that the model can give: its token is then the vocabulary's own.
    """

    def ids(text: str) -> list[int]:
        found: list[int] = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    before = ids(context)
    tokenised = {value: ids(context + name) for value, name in names.items()}
    found = {v: t[-1] for v, t in tokenised.items() if t[:-1] == before}
    if 2 * len(found) > len(names):
        vocabulary = lm.tokenizer.get_vocab()
        merged = {v: vocabulary[name] for v, name in names.items() if name in vocabulary}
        found = merged | found
    usable = {v: i for v, i in found.items() if i != lm.tokenizer.unk_token_id}
    return dict(sorted(usable.items()))


def _prompts(
    lm: LanguageModel, templates: Sequence[str], form: Form
) -> tuple[list[_Prompt], dict[str, str], tuple[Tensor, ...]]:
    """The prompts that tokenise as assumed, the years that do not, and the first template's of these."""
    found: list[_Prompt] = []
    left_out: dict[str, str] = {}
    misfits: list[Tensor] = []
    for i, template in enumerate(templates):
        tokenised = {year: lm.tokenize(template.format(yy=year)) for year in YEARS}
        usual = Counter(tokens.shape[1] for tokens in tokenised.values()).most_common(1)[0][0]
        subject_pos = _subject_pos(lm, template, tokenised, usual)
        for year, tokens in tokenised.items():
            wanted = f"{year:02d}" if form == "years" else f"{year:02d}"[0]
            reason = _misfit(lm, tokens, usual, subject_pos, wanted)
            if reason:
                left_out[f"{template.format(yy=year)!r}"] = reason
                misfits += [tokens] if i == 0 else []
            else:
                found.append(_Prompt(year, i, tokens, subject_pos))
    if not found:
        raise InputError(
            f"{lm.name}: no year can be used in {list(templates)}: "
            f"{next(iter(left_out.values()), 'no prompts')}"
        )
    places = {(prompt.tokens.shape[1], prompt.subject_pos) for prompt in found}
    if len(places) > 1:
        raise InputError(
            f"{lm.name}: templates give (length, place of the year) {sorted(places)}: "
            "expected the same for all"
        )
    return found, left_out, tuple(misfits)


def _subject_pos(
    lm: LanguageModel, template: str, tokenised: Mapping[int, Tensor], usual: int
) -> int:
    """The first position at which prompts of the usual length differ."""
    rows = torch.cat([tokens for tokens in tokenised.values() if tokens.shape[1] == usual])
    differs = (rows != rows[0]).any(0).nonzero()
    if len(differs) == 0:
        raise InputError(
            f"{lm.name}: {template!r} is the same for every year: expected {{yy:02d}} in it"
        )
    return int(differs[0])


def _misfit(
    lm: LanguageModel, tokens: Int[Tensor, "1 pos"], usual: int, subject_pos: int, wanted: str
) -> str:
    """Why a prompt cannot be used; empty if it can."""
    if tokens.shape[1] != usual:
        return f"{tokens.shape[1]} tokens where the others have {usual}"
    (text,) = lm.token_strings([int(tokens[0, subject_pos])])
    if text.strip() != wanted:
        return f"token {text!r} where {wanted!r} was expected"
    return ""


@torch.no_grad()
def mean_probability_difference(lm: LanguageModel, task: GreaterThan) -> float:
    """The paper's metric of a model: the mean difference over the prompts that count."""
    return float(probability_differences(lm, task.scored()).mean())


@torch.no_grad()
def probability_differences(lm: LanguageModel, task: GreaterThan) -> Float[Tensor, "prompt"]:
    """The paper's metric of each prompt."""
    return task.differences(task.answer_probabilities(lm.last_logits(task.tokens)))


@torch.no_grad()
def full_vocabulary_differences(lm: LanguageModel, task: GreaterThan) -> Float[Tensor, "prompt"]:
    """Hanna et al.'s metric of each prompt: the same difference, p from the whole vocabulary."""
    probabilities = lm.last_logits(task.tokens).float().softmax(-1)
    return task.differences(probabilities[:, task.answer_ids])


@torch.no_grad()
def next_digit_mass(lm: LanguageModel, digit: int, century: int = 17) -> tuple[float, float]:
    """Probability that a model with one token a digit gives to years that are late enough.

    After "The war lasted from the year 17d0 to the year 17", the next digit's mass on digits from
    `digit` up and below `digit`. Returns (at or above, below).
    """
    tokens = lm.tokenize(f"The war lasted from the year {century}{digit}0 to the year {century}")
    probabilities = lm.logits(tokens)[0, -1].float().softmax(-1)
    digit_ids = [lm.tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
    mass = probabilities[torch.tensor(digit_ids, device=probabilities.device)]
    return float(mass[digit:].sum()), float(mass[:digit].sum())
