"""Recordings as inputs of speech models, and their transcripts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from .greedy import end_tokens, filled, greedy

_SHORT = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
"""Line of libsndfile's log of a WAV file that holds fewer bytes of sound than it says."""
_UNKNOWN_LENGTH = 0x7FFF0000
"""Least number of bytes that a program writes into the header of a WAV file when it does not know their number."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A decoded recording."""

    samples: Any
    """Samples of one channel from -1 to 1, float32 of shape (T,)."""
    rate: int
    """Sampling rate in Hz of the file."""
    channels: int
    """Number of channels of the file, of which `samples` is the mean."""

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.samples) / self.rate


def open_recording(content: bytes) -> Recording:
    """Decode an audio file (WAV, FLAC, Ogg, MP3 and others that libsndfile reads).

    Raises:
        ValueError: it is none, is cut off, holds no sound, or holds values that are not finite.
    """
    import numpy as np
    import soundfile

    try:
        with soundfile.SoundFile(BytesIO(content)) as file:
            frames, rate, short = file.frames, file.samplerate, _SHORT.search(file.extra_info)
            found = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError, OverflowError) as error:
        said = str(getattr(error, "error_string", error)).rstrip(".")  # without the address of the object in memory
        raise ValueError(f"not an audio file that can be read: {said}") from error
    if short and int(short[2]) < int(short[1]) < _UNKNOWN_LENGTH:
        raise ValueError(f"not a whole audio file: it has {int(short[2]):,} of its {int(short[1]):,} bytes of sound")
    if len(found) != frames:
        raise ValueError(f"not a whole audio file: it has {len(found):,} of its {frames:,} samples")
    if not len(found):
        raise ValueError("an audio file without a sample")
    if not np.isfinite(found).all():
        raise ValueError("an audio file with samples that are not finite")
    return Recording(samples=found.mean(axis=1), rate=int(rate), channels=found.shape[1])


def longest_seconds(processor: Any) -> float:
    """Return the duration in seconds that a base hears; its features of longer recordings would be cut."""
    heard = processor.feature_extractor
    return float(heard.n_samples / heard.sampling_rate)


def features_of(processor: Any, recordings: Sequence[Recording]) -> Any:
    """Return the log-mel spectra of recordings, shape (B, mel, frames), by the base's own processor.

    A recording of another rate is resampled (polyphase filter), and each is padded with silence.

    Raises:
        ValueError: a recording is longer than the base hears.
    """
    from scipy.signal import resample_poly

    heard, most = processor.feature_extractor, longest_seconds(processor)
    wanted, sounds = int(heard.sampling_rate), []
    for each in recordings:
        if each.seconds > most:
            raise ValueError(f"a recording of {each.seconds:.1f} s; the base hears at most {most:g} s")
        shared = math.gcd(wanted, each.rate)
        same = each.rate == wanted
        sounds.append(each.samples if same else resample_poly(each.samples, wanted // shared, each.rate // shared))
    return heard(sounds, sampling_rate=wanted, return_tensors="pt")["input_features"]


def set_language(processor: Any, language: str) -> None:
    """Set the language token with which every transcript begins.

    Raises:
        ValueError: it is not one of Whisper's languages.
    """
    processor.tokenizer.set_prefix_tokens(language=language, task="transcribe")


def transcribe(
    model: Any, processor: Any, recordings: Sequence[Recording], *, max_new_tokens: int, batch_size: int = 8
) -> list[str]:
    """Return the transcript of each recording, by greedy search after the tokens of language and task.

    transformers' own generation for Whisper is not used: it suppresses tokens, falls back to sampling and
    detects languages by a checkpoint's settings.

    Args:
        model: Whisper model, with or without adapter.
        processor: processor of the base.
        recordings: recordings, each no longer than the base hears.
        max_new_tokens: maximum number of new tokens per transcript; fewer if the model has no positions for them.
        batch_size: number of recordings per call of the model.
    """
    from transformers import GenerationMixin

    tokenizer, prefix = processor.tokenizer, list(processor.tokenizer.prefix_tokens)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends, room = end_tokens(model, processor), min(max_new_tokens, inner.config.max_target_positions - len(prefix))
    model.eval()
    texts: list[str] = []
    for start in range(0, len(recordings), batch_size):
        part = recordings[start : start + batch_size]
        features = features_of(processor, part).to(model.device)
        inputs = {
            "input_features": features,
            # Whisper's encoder hears all frames; without a mask, `generate` warns where padding is end-of-text.
            "attention_mask": features.new_ones(len(part), features.shape[-1], dtype=int),
            "decoder_input_ids": filled([prefix] * len(part), 0).to(model.device),
        }
        texts += greedy(
            model, tokenizer, inputs, max_new_tokens=room, ends=ends, pad=int(tokenizer.eos_token_id),
            skip=len(prefix), generate=lambda **given: GenerationMixin.generate(inner, **given),
        )  # fmt: skip
    return texts
