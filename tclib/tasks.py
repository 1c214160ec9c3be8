"""Greater-than: prompts, answer tokens and the paper's metric (Section 5.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.lm import LanguageModel
from tclib.runs import InputError

YEARS = range(100)
SCORED_YEARS = range(1, 99)  # 01 to 98, as in the authors' code: both sides have an answer
PAPER_TEMPLATE = "The war lasted from 17{yy:02d} to 17"
DEMO_TEMPLATE = "The war lasted from the year 17{yy:02d} to the year 17"


@dataclass(frozen=True)
class GreaterThan:
    """Prompts for every YY from 00 to 99 and the hundred answer tokens "00" to "99"."""

    tokens: Int[Tensor, "year pos"]
    answer_ids: Int[Tensor, "year"]

    @classmethod
    def of(cls, lm: LanguageModel, template: str = DEMO_TEMPLATE) -> GreaterThan:
        """Prompts of `template`, in which `{yy:02d}` is the year.

        Errors: `InputError` if some YY is not one token, or prompts differ in length.
        """
        prompts = [lm.tokenize(template.format(yy=year)) for year in YEARS]
        lengths = {prompt.shape[1] for prompt in prompts}
        if len(lengths) > 1:
            raise InputError(f"{lm.name}: prompts of {template!r} have lengths {sorted(lengths)}")
        vocabulary = lm.tokenizer.get_vocab()
        answers = [vocabulary.get(f"{year:02d}") for year in YEARS]
        missing = [
            f"{year:02d}" for year, token_id in zip(YEARS, answers, strict=True) if token_id is None
        ]
        if missing:
            raise InputError(f"{lm.name}: years {missing[:5]} … are not single tokens")
        return cls(torch.cat(prompts), torch.tensor(answers, device=lm.device))

    def root_weights(self, year: int) -> dict[int, float]:
        """The mean logit of the years after `year` minus the mean of all others, by token id.

        Errors: `InputError` for a year outside 0 to 98, after which nothing comes.
        """
        if not 0 <= year < len(YEARS) - 1:
            raise InputError(f"year {year}: expected 0 to {len(YEARS) - 2}")
        ids = self.answer_ids.tolist()
        later, others = ids[year + 1 :], ids[: year + 1]
        return {i: 1 / len(later) for i in later} | {i: -1 / len(others) for i in others}

    def year_probabilities(
        self, logits: Float[Tensor, "year pos d_vocab"]
    ) -> Float[Tensor, "year answer"]:
        """Softmax over the 100 YY tokens at the last position."""
        return logits[:, -1, self.answer_ids].float().softmax(-1)


def probability_differences(
    year_probabilities: Float[Tensor, "year answer"],
) -> Float[Tensor, "year"]:
    """Σ_{y' > y} p(y') − Σ_{y' ≤ y} p(y') for every prompt year y."""
    n_years = year_probabilities.shape[1]
    years = torch.arange(n_years, device=year_probabilities.device)
    sign = torch.where(years[None, :] > years[:, None], 1.0, -1.0)
    return (year_probabilities * sign).sum(1)


def mean_probability_difference(lm: LanguageModel, task: GreaterThan) -> float:
    """The paper's metric: the mean difference over prompt years 01 to 98."""
    differences = probability_differences(task.year_probabilities(lm.logits(task.tokens)))
    return float(differences[SCORED_YEARS.start : SCORED_YEARS.stop].mean())
