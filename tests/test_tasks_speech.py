"""Recordings and their transcripts, from a table of files to a proven and served adapter."""

from __future__ import annotations

import base64
import json
import re
import shutil
from io import BytesIO
from pathlib import Path

import mlflow
import numpy as np
import pytest
import soundfile
import torch
from conftest import save_byte_tokenizer
from hearing import SECONDS, save_hearing_base, save_recordings
from task_bases import run_and_prove, small_study

from adaptive_lora.errors import ConfigError, DataError, MissingExtra, ModelError
from adaptive_lora.models.tasks.scores import word_errors
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.serving import Recording, features_of, open_processor, open_recording
from adaptive_lora.tracking.registry import adapter_folder, requirements_of


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hearing_base(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of thirty-six recordings beside their files."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "rows.json").write_text(json.dumps(save_recordings(folder, 36)), encoding="utf-8")
    return folder / "rows.json"


def test_from_recordings_to_a_served_adapter(base: Path, recordings: Path, own_store: str) -> None:
    """The task is found, both towers are trained, words are scored, and what is served is what was scored."""
    config = small_study(
        base,
        recordings,
        methods="uniform:rank=2 empirical:rank=1 uniform:rank=2,towers=encoder",
        tracking_uri=own_store,
        max_steps=12,
        generate="on",
    )
    proven = run_and_prove(config)
    towers = {record.method: {site["tower"] for site in record.plan["sites"]} for record in proven.records}
    assert towers["uniform-r2"] == {"encoder", "decoder"}
    assert towers["uniform-r2-encoder"] == {"encoder"}
    for record in proven.records:
        assert record.tags["task"] == "speech_to_text"
        assert record.validation_loss < record.validation_curve[0][1]
        assert record.test is not None
        words = record.test.further_E["wer"] * 2  # two words in every transcript
        assert record.metrics["test/wer"] == pytest.approx(words.sum() / (2 * len(words)))
        assert {"cer", "wer_normalised"} <= record.test.overall.keys()
    assert re.search(r"recordings 28\.8 s in all, 0\.80 to 0\.80 s each; 18 at 8,000 Hz, 18 at 16,000 Hz", proven.shown)
    assert "8 recordings have several channels: their mean is used" in proven.shown
    assert "[[ " in proven.shown
    served = mlflow.pyfunc.load_model(proven.champion)
    file = recordings.parent / "0.flac"
    asked = [{"audio": str(file)}, {"audio": base64.b64encode(file.read_bytes()).decode()}]
    first, second = served.predict(asked, params={"max_new_tokens": 12})
    assert first == second
    assert {"soundfile", "scipy"} <= set(requirements_of(adapter_folder(proven.champion)))


def test_the_loss_is_that_of_the_model_and_the_greedy_transcript_is_its_own(base: Path, recordings: Path) -> None:
    """Padding and batching change nothing; the tokens before a transcript are not learned."""
    context = StudyContext(small_study(base, recordings))
    test, model = context.splits(0).test, context.base.model
    result = context.losses(model, test)
    for example, nll in zip(test, result.nll_E, strict=True):
        batch = context.task.collate([example])
        assert batch.inputs["decoder_input_ids"][0, :2].tolist() == [257, 262]
        assert batch.supervised_tokens == len(example.response) + 2  # a blank before and the end after it
        own = model(**batch.inputs, labels=batch.labels).loss
        assert nll == pytest.approx(float(own) * example.supervised_tokens, rel=1e-4)
    written = context.task.generated(model, test[:3])
    for example, text in zip(test[:3], written, strict=True):
        batch = context.task.collate([example])
        ids = [257, 262]
        while len(ids) < 2 + max(each.supervised_tokens for each in test[:3]) and ids[-1] != 256:
            row = torch.tensor([ids])
            ids.append(int(model(batch.inputs["input_features"], decoder_input_ids=row).logits[0, -1].argmax()))
        assert text == context.task.tokenizer.decode(ids[2:], skip_special_tokens=True).strip()


def test_features_are_those_of_the_resampled_mean(base: Path) -> None:
    """A tone sampled at 8 kHz in stereo gives nearly the spectrum of that sampled at 16 kHz."""
    processor = open_processor(base, {"name": "speech_to_text"})

    def tone(rate: int, channels: int) -> Recording:
        sound = 0.3 * np.sin(2 * np.pi * 700 * np.arange(rate * 4 // 5) / rate)
        file = BytesIO()
        soundfile.write(file, np.stack([sound] * channels, axis=1), rate, format="WAV")
        return open_recording(file.getvalue())

    same, other = features_of(processor, [tone(16000, 1), tone(8000, 2)])
    assert same.shape == (16, 100 * SECONDS)
    heard = same[:6, :70]  # below 1,500 Hz, before the silence
    assert float((heard - other[:6, :70]).abs().max()) < 0.05
    assert float(heard.std()) > 0.2


def test_word_errors_by_hand() -> None:
    """Over all references there are 7 words, of which the transcripts have 3 wrong."""
    from types import SimpleNamespace

    pairs = [("The cat sat.", "the cat sat"), ("a b c d", "a x c d d")]
    found = word_errors([text for _, text in pairs], [SimpleNamespace(response=reference) for reference, _ in pairs])
    assert found.rates.tolist() == pytest.approx([2 / 3, 2 / 4])
    assert found.overall["wer"] == pytest.approx(4 / 7)
    assert found.overall["wer_normalised"] == pytest.approx(2 / 7)
    assert found.overall["cer"] == pytest.approx((2 + 3) / (12 + 7))


def bad_rows(folder: Path) -> Path:
    """Write a table in which four rows cannot be used."""
    rows = save_recordings(folder, 20)
    (folder / "1.wav").write_bytes(b"no sound")
    rows[2]["audio"] = "none.wav"
    content = (folder / "3.flac").read_bytes()
    (folder / "3.flac").write_bytes(content[: len(content) // 2])
    soundfile.write(folder / "4.wav", np.zeros(int(16000 * SECONDS * 1.5)), 16000)
    rows[5]["text"] = " "
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


def test_rows_that_cannot_be_used_are_named_or_counted(base: Path, tmp_path: Path) -> None:
    data = bad_rows(tmp_path)
    with pytest.raises(DataError) as refused:
        StudyContext(small_study(base, data))
    said = str(refused.value)
    assert "rows.json item 1 (line 1): column 'audio' must be a recording: not an audio file that can be read" in said
    assert "item 2 (line 1): column 'audio' must be a recording: [Errno 2] No such file" in said
    assert re.search(r"item 3 \(line 1\): column 'audio' must be a recording: not an? (whole|audio) .*file", said)
    assert "item 5 (line 1): column 'text' is empty" in said
    block = "\n".join(StudyContext(small_study(base, data, on_bad_row="skip")).data_summary.lines())
    assert "3 rows: column 'audio' holds no recording that can be read (first: rows.json item 1 (line 1))" in block
    assert "1 row: recordings longer than the 1 s that the base hears (first: rows.json item 4 (line 1))" in block
    assert "1 row: column 'text' is empty" in block


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "not an audio file"), (np.zeros(0), "without a sample"), (np.array([0.0, np.nan, 0.1]), "not finite")],
)
def test_what_is_no_recording(content: bytes | np.ndarray, says: str) -> None:
    file = BytesIO()
    if isinstance(content, np.ndarray):
        soundfile.write(file, content, 16000, format="WAV", subtype="FLOAT")
        content = file.getvalue()
    with pytest.raises(ValueError, match=says):
        open_recording(content)


def test_a_cut_recording_is_none_and_one_of_unknown_length_is_whole() -> None:
    """What is left of a cut file could be read; its transcript would be that of the whole."""
    file = BytesIO()
    soundfile.write(file, np.zeros(1000), 16000, format="WAV", subtype="PCM_16")
    content = file.getvalue()
    with pytest.raises(ValueError, match=r"not a whole audio file: it has [\d,]+ of its [\d,]+ bytes of sound"):
        open_recording(content[:-500])
    at = content.index(b"data") + 4
    streamed = content[:at] + b"\xff\xff\xff\xff" + content[at + 4 :]  # as ffmpeg writes it to a pipe
    assert len(open_recording(streamed).samples) == 1000


def test_a_base_with_another_tokenizer_is_refused(base: Path, recordings: Path, tmp_path: Path) -> None:
    """Without a token before a transcript there is nothing that its first token follows."""
    other = tmp_path / "other"
    shutil.copytree(base, other)
    for file in other.glob("*token*"):
        file.unlink()
    save_byte_tokenizer(other)
    with pytest.raises(ModelError, match=r"puts no token such as <\|startoftranscript\|> before a transcript"):
        StudyContext(small_study(other, recordings))


def test_a_base_of_several_languages(base: Path, recordings: Path, tmp_path: Path, own_store: str) -> None:
    """The language is required, given before every transcript, kept with the adapter, and known by name or code."""
    several = save_hearing_base(tmp_path / "several", languages=True)
    with pytest.raises(ModelError, match="knows several languages, and its processor names none; required --language"):
        StudyContext(small_study(several, recordings))
    with pytest.raises(ConfigError, match="unknown language 'germn'; did you mean 'german'"):
        StudyContext(small_study(several, recordings, language="germn"))
    with pytest.raises(ConfigError, match="knows English alone; leave --language out"):
        StudyContext(small_study(base, recordings, language="en"))
    config = small_study(several, recordings, language="German", tracking_uri=own_store, generate="on")
    context = StudyContext(config)
    assert context.splits(0).test[0].inputs["prefix_ids"] == (257, 260, 261, 262)
    assert context.splits(0).digest == StudyContext(small_study(several, recordings, language="de")).splits(0).digest
    assert context.splits(0).digest != StudyContext(small_study(several, recordings, language="zh")).splits(0).digest
    proven = run_and_prove(config)
    served = mlflow.pyfunc.load_model(proven.champion)
    row = {"audio": str(recordings.parent / "1.wav")}
    assert isinstance(served.predict([row], params={"max_new_tokens": 3})[0], str)


def test_a_folder_with_a_table_of_transcripts(base: Path, recordings: Path, tmp_path: Path) -> None:
    """`datasets` would ask for another decoder; the table of the folder is read as it is written."""
    folder = tmp_path / "set"
    shutil.copytree(recordings.parent, folder)
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    (folder / "rows.json").unlink()
    lines = ["file_name,transcription", *(f"{row['audio']},{row['text']}" for row in rows)]
    (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    context = StudyContext(small_study(base, folder))
    assert len(context.data.every) == 36
    block = "\n".join(context.data_summary.lines())
    assert "audio: recording, transcription: transcript" in block


@pytest.mark.parametrize("held", ["bytes", "path"])
def test_parquet_with_the_feature_of_recordings(base: Path, recordings: Path, tmp_path: Path, held: str) -> None:
    import datasets

    rows = json.loads(recordings.read_text(encoding="utf-8"))
    files = [recordings.parent / row["audio"] for row in rows]
    audio = [
        {"bytes": file.read_bytes() if held == "bytes" else None, "path": str(file) if held == "path" else None}
        for file in files
    ]
    table = datasets.Dataset.from_dict({"audio": audio, "sentence": [row["text"] for row in rows]})
    table.cast_column("audio", datasets.Audio(decode=False)).to_parquet(tmp_path / "rows.parquet")
    context = StudyContext(small_study(base, tmp_path / "rows.parquet"))
    assert context.data.digest == StudyContext(small_study(base, recordings)).data.digest


def test_other_speech_models_and_missing_packages_are_named(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 263, "encoder_ffn_dim": 16,
             "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    folder = save_hearing_base(tmp_path / "other")
    config = transformers.Speech2TextConfig(**small)
    transformers.Speech2TextForConditionalGeneration(config).save_pretrained(folder)
    with pytest.raises(
        ModelError, match="is of the type 'speech_to_text'; required for --task speech_to_text: a Whisper"
    ):
        StudyContext(small_study(folder, recordings))
    monkeypatch.setattr("adaptive_lora.errors.installed", lambda module: module != "soundfile")
    with pytest.raises(
        MissingExtra, match=r'needs soundfile, which is not installed: pip install "adaptive-lora\[audio\]"'
    ):
        StudyContext(small_study(save_hearing_base(tmp_path / "own"), recordings))
