"""A dictionary of the raw basis in the processed one, and back."""

from __future__ import annotations

from dataclasses import replace

from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.lazy import LazyDictionary
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError


def to_processed(dictionary: Dictionary, lm: LanguageModel) -> Dictionary:
    """A raw-basis transcoder in the processed basis; one that is processed, or reads the stream, comes back as it is.

    Errors: `InputError` for a dictionary of another model.
    """
    dictionary.check_origin(lm)
    if dictionary.config.basis != "raw":
        return dictionary
    norm, centre = lm.mlp_norm(dictionary.config.layer), lm.final_norm.centre
    gain = norm.gain.to(dictionary.b_dec)
    norm = replace(norm, gain=gain, bias=None if norm.bias is None else norm.bias.to(gain))
    if isinstance(dictionary, LazyDictionary):
        if norm.bias is None and lm.final_norm.kind != "layer":
            return dictionary.with_gain(norm)
        dictionary = dictionary.whole()
    b_enc, b_dec = dictionary.b_enc, dictionary.b_dec
    if norm.bias is not None:
        b_enc = b_enc + norm.bias @ dictionary.W_enc
    W_skip = dictionary.W_skip
    if W_skip is not None:
        if norm.bias is not None:
            b_dec = b_dec + norm.bias @ W_skip
        W_skip = centre(norm.gain[:, None] * W_skip)
    return Dictionary(
        replace(dictionary.config, basis="processed"),
        norm.gain[:, None] * dictionary.W_enc,
        b_enc,
        centre(dictionary.W_dec),
        centre(b_dec),
        W_skip,
        dictionary.threshold,
    )


def to_raw(dictionary: Dictionary, lm: LanguageModel) -> Dictionary:
    """The inverse for the input side; the output stays centred, which nothing that reads it can tell.

    Errors: `InputError` for a dictionary of another model, or of the stream, which no norm made; or where the norm has
    a gain of zero, through which nothing can be undone.
    """
    dictionary.check_origin(lm)
    if dictionary.config.basis == "raw":
        return dictionary
    if dictionary.config.reads_stream:
        raise InputError(
            f"the transcoder of layer {dictionary.config.layer} reads the stream, from which no norm's output follows "
            "token by token: it has no raw basis"
        )
    norm = lm.mlp_norm(dictionary.config.layer)
    if bool((norm.gain == 0).any()):
        raise InputError(
            f"layer {dictionary.config.layer} has norm gains of zero: no raw basis exists"
        )
    W_enc = dictionary.W_enc / norm.gain[:, None]
    W_skip = None if dictionary.W_skip is None else dictionary.W_skip / norm.gain[:, None]
    b_enc, b_dec = dictionary.b_enc, dictionary.b_dec
    if norm.bias is not None:
        b_enc = b_enc - norm.bias @ W_enc
        b_dec = b_dec if W_skip is None else b_dec - norm.bias @ W_skip
    config = replace(dictionary.config, basis="raw")
    return Dictionary(config, W_enc, b_enc, dictionary.W_dec, b_dec, W_skip, dictionary.threshold)
