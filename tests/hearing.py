"""A small Whisper base with random weights, and recordings of tones for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

TONES = {"low": 300, "mid": 900, "high": 2500}
"""Word -> frequency in Hz of its tone."""
SECONDS = 1
"""Duration that the base hears; the positions of its encoder are 50 for each second."""
SPEECH = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 263,
    "num_mel_bins": 16, "max_source_positions": 50 * SECONDS, "max_target_positions": 40,
    "pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256, "decoder_start_token_id": 257,
}  # fmt: skip
MARKS = (
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>",
)  # fmt: skip


def save_hearing_base(folder: Path, *, languages: bool = False, **settings: Any) -> Path:
    """Write a Whisper model with a byte tokenizer; with `languages` it knows several."""
    import transformers
    from tokenizers import pre_tokenizers

    symbols = (*sorted(pre_tokenizers.ByteLevel.alphabet()), *MARKS)
    tokenizer = transformers.WhisperTokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)},
        merges=[],
        additional_special_tokens=list(MARKS[1:]),
    )
    heard = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS)
    transformers.WhisperProcessor(heard, tokenizer).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**{**SPEECH, **settings}))
    ends = {name: SPEECH[name] for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")}
    model.generation_config = transformers.GenerationConfig(**ends, is_multilingual=languages)
    model.save_pretrained(folder)
    return folder


def save_recordings(folder: Path, count: int) -> list[dict[str, str]]:
    """Write tones as WAV and FLAC files of two sampling rates, some in stereo; return what is heard in each."""
    import soundfile

    draw, noise = random.Random(0), np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        words, rate = draw.choices(list(TONES), k=2), (16000, 8000)[number % 2]
        times = np.arange(rate * 2 // 5) / rate
        sound = np.concatenate([0.3 * np.sin(2 * np.pi * TONES[word] * times) for word in words])
        sound += noise.normal(0, 0.01, sound.shape)
        name = f"{number}.{('wav', 'flac')[number % 3 == 0]}"
        soundfile.write(folder / name, np.stack([sound, sound], axis=1) if number % 5 == 0 else sound, rate)
        rows.append({"audio": name, "text": " ".join(words)})
    return rows
