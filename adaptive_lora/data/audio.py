"""Examples of recordings with their transcripts."""

from __future__ import annotations

from collections import Counter

from adaptive_lora.config import DataConfig
from adaptive_lora.data.examples import Example, ExampleSet, content_id
from adaptive_lora.data.images import media_of
from adaptive_lora.data.labelled import pick
from adaptive_lora.data.reading import Table, read_table, separate_test
from adaptive_lora.data.rows import refuse_weights, required_text
from adaptive_lora.data.sources import Reader, example_set
from adaptive_lora.serving import Recording, open_recording

_RECORDINGS = ("audio", "recording", "speech", "wav", "file_name", "audio_path", "path", "file")
_TRANSCRIPTS = ("text", "sentence", "transcription", "transcript", "raw_transcription", "response")


def load_transcripts(config: DataConfig) -> ExampleSet:
    """Return recordings with their transcripts.

    Raises:
        DataError: the data cannot be read, or a column, recording or transcript is missing.
    """
    table, test = read_table(config), separate_test(config)
    return example_set(config, table, _reader(table, config), test=None if test is None else load_transcripts(test))


def _reader(table: Table, config: DataConfig) -> Reader:
    """Return the reader of a table; a recording's name is its digest, so that repeated ones are in one split."""
    heard = pick(table, config.audio_column, _RECORDINGS, "audio_column", "the recording")
    written = pick(table, config.response_column, _TRANSCRIPTS, "response_column", "the transcript")
    columns, seen, lengths = {heard: "recording", written: "transcript"}, dict[str, int](), _Lengths()

    def example(index: int) -> Example:
        row, where = table.rows[index], table.where(index)
        refuse_weights(row, columns, where)
        transcript = required_text(row, written, where)
        opened: list[Recording] = []
        media, _ = media_of(
            row, heard, where, table.home, opened=lambda file: opened.append(open_recording(file)), what="a recording"
        )
        lengths.add(opened[0])
        name = f"recording {media.digest.hex()[:16]}"
        return Example(
            id=content_id(name, transcript, seen), prompt=name, response=transcript, where=where, media=media
        )

    options = ("audio_column", "response_column", "language")
    return Reader(example=example, columns=columns, options=options, notes=lengths.notes)


class _Lengths:
    """Durations, sampling rates and channels of the recordings read."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.rates: Counter[int] = Counter()
        self.mixed = 0

    def add(self, recording: Recording) -> None:
        """Count a recording."""
        self.seconds.append(recording.seconds)
        self.rates[recording.rate] += 1
        self.mixed += recording.channels > 1

    def notes(self) -> list[str]:
        """Return the remarks for the user."""
        total, rates = (
            sum(self.seconds),
            ", ".join(f"{count:,} at {rate:,} Hz" for rate, count in sorted(self.rates.items())),
        )
        if not self.seconds:
            return []
        length = f"{total / 3600:,.1f} hours" if total >= 7200 else f"{total:,.1f} s"
        said = f"recordings {length} in all, {min(self.seconds):.2f} to {max(self.seconds):.2f} s each; {rates}"
        mixed = [f"{self.mixed:,} recordings have several channels: their mean is used"] if self.mixed else []
        return [said, *mixed]
