"""Study files and settings that are wrong."""

from __future__ import annotations

from bad_inputs.case import Bad, in_file, spoken

_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
_FILES: dict[str, tuple[str | bytes, str]] = {
    "a tab": ("\tseeds: 0", "is not YAML"),
    "a list": ("- seeds", "required `setting: value` lines"),
    "a word": ("hello", "required `setting: value` lines"),
    "an unclosed bracket": ("seeds: [0, 1", "is not YAML"),
    "two documents": ("seeds: 0\n---\nseeds: 1", "is not YAML"),
    "a setting twice": ("seeds: 0\nlr: 1e-3\nseeds: 1", "is given twice"),
    "a misspelt setting": ("seedz: 0", "did you mean 'seeds'"),
    "a setting of Python": ("__class__: 1", "unknown setting"),
    "an empty setting": ("'': 1", "unknown setting"),
    "a number as setting": ("1: 2", "unknown setting"),
    "null as setting": ("null: 2", "unknown setting"),
    "a list as setting": ("? [a, b]\n: 1", "is not YAML"),
    "a very long setting": ("k" * 900 + ": 1", "unknown setting"),
    "a mapping as value": ("seeds: {a: 1}", "seeds: expected a whole number"),
    "a list as value": ("batch_size: [1, 2]", "batch_size: expected a whole number"),
    "a date as value": ("batch_size: 2024-01-01", "batch_size: expected a whole number"),
    "bytes as value": ("study: !!binary aGVsbG8=", "study: expected text"),
    "a set as value": ("seeds: !!set {1, 2}", "seeds: expected a whole number"),
    "a word as number": ("epochs: many", "epochs: expected a number"),
    "true as number": ("batch_size: true", "batch_size: expected a whole number"),
    "a word as switch": ("gradient_checkpointing: maybe", "expected true or false"),
    "NaN": ("lr: .nan", "lr: expected a number"),
    "infinity": ("lr: .inf", "lr: expected a number"),
    "nan as text": ("alpha: nan", "alpha: expected a number"),
    "both names": ("scale: 2\nalpha: 32", "scale is the earlier name of alpha"),
    "a number beyond floats": ("lr: 1e999", "lr: expected a number"),
    "a whole number beyond floats": ("batch_size: " + "9" * 400, "batch_size: expected a whole"),
    "a number of 5,000 digits": ("batch_size: " + "9" * 5000, "bad.yaml"),
    "a fraction as whole number": ("batch_size: 1.5", "batch_size: expected a whole number"),
    "a negative seed": ("seeds: -1", "seeds must be at least 0"),
    "a seed beyond 2^32": ("seeds: 99999999999999999999", "seeds must be at most"),
    "a negative split seed": ("split_seed: -3", "split_seed must be at least 0"),
    "a rate of zero": ("lr: 0", "lr must be above 0"),
    "a negative rate": ("lr: -1e-3", "lr must be above 0"),
    "no method": ("methods: []", "methods: required at least one"),
    "no seed": ("seeds: []", "seeds: required at least one"),
    "a seed twice": ("seeds: [1, 1]", "given more than once"),
    "a method twice": ("methods: [uniform, uniform]", "given more than once"),
    "an unknown baseline": ("baseline: nope", "unknown baseline"),
    "shares without rest": ("validation_share: 0.5\ntest_share: 0.5", "nothing to train on"),
    "a share above a half": ("test_share: 0.9", "at most 0.5"),
    "no folds": ("folds: 0", "folds must be at least 1"),
    "no examples": ("max_examples: 0", "max_examples must be at least 1"),
    "an unknown precision": ("precision: fp64", "precision must be one of"),
    "an unknown schedule": ("schedule: '[red]x[/]'", "schedule must be one of"),
    "an unknown correction": ("correction: none", "correction must be one of"),
    "an unknown storage": ("checkpoints: 's4://u:pass@bucket/x'", "s4://***@bucket/x: unknown storage protocol 's4'"),
    "a storage without folder": ("checkpoints: 'memory://'", "required a bucket or folder after memory://"),
    "a storage that takes no files": ("checkpoints: 'https://host/x'", "required a storage that can be written to"),
    "a study of dots": ("study: ..", "study must be"),
    "a study with a path": ("study: ../../etc", "study must be"),
    "a study with a newline": ('study: "a\\nb"', "study must be"),
    "an empty study": ("study: ''", "study must be"),
    "a model name with a path": ("registered_model: ../x", "registered_model must be"),
    "a model name of dots": ("registered_model: '..'", "registered_model must be"),
    "an experiment with a path": ("experiment: ../../x", "experiment must be"),
    "an experiment with an escape": ('experiment: "a\\x1b[2Jb"', "experiment must be"),
    "an experiment that climbs": ("experiment: 'a/../b'", "experiment must be"),
    "a Python object": ('data: !!python/object/apply:os.system ["touch canary"]', "is not YAML"),
    "a Python name": ("data: !!python/name:os.system", "is not YAML"),
    "a Python module": ("data: !!python/module:os", "is not YAML"),
    "a billion laughs": (_BOMB, "anchors"),
    "an alias of itself": ("seeds: &a [*a]", "anchors"),
    "a merged mapping": ("x: &x {lr: 1}\n<<: *x", "anchors"),
    "nested without end": ("seeds: " + "[" * 20_000, "nested too deeply"),
    "not UTF-8": (b"study: \xff\xfe", "cannot be read"),
    "UTF-16": ("seeds: 0".encode("utf-16"), "cannot be read"),
    "NUL bytes": (b"seeds: 0\0", "is not YAML"),
    "an escape sequence": (b"study: \x1b[2J", "is not YAML"),
}  # fmt: skip

_RUNS = (
    "--model", "BASE", "--data", "rows.json", "--template", "compact",
    "--methods", "uniform:rank=1", "--seeds", "0", "--max-steps", "1", "--max-tokens", "120",
)  # fmt: skip
_ENDS = ("--data", "nowhere.json")
"""What would end the command if its first mistake were not found."""
CASES: tuple[Bad, ...] = (
    *in_file(_FILES, "study file", "bad.yaml", "study", "--config", "bad.yaml", *_ENDS),
    *spoken(
        {
            "missing": (("study", "--config", "nowhere.yaml"), "cannot be read"),
            "a folder": (("study", "--config", "."), "is a directory"),
            "a device without end": (("study", "--config", "/dev/zero"), "cannot be read"),
            "unknown option": (("study", "--nonsense", "1"), "No such option"),
            "option without value": (("study", "--seeds"), "requires an argument"),
            "unknown command": (("studdy",), "No such command"),
            "an escape in a name": (("study", "--study", "\x1b[31mred", *_ENDS), "\\x1b[31mred"),
            "markup in a name": (("study", "--study", "[red]x[/red]", *_ENDS), "[red]x[/red]"),
            "two trials in train": (
                ("train", "--data", "nowhere.json", "--lr", "1,2"), "train runs one trial",
            ),
            "evaluate without adapter": (("evaluate",), "needs --adapter"),
            "evaluate of no such fold": (
                ("evaluate", "--adapter", "x", "--fold", "9"), "fold must be 0 to 0",
            ),
            "power without noise": (("power", "--difference", "1"), "power needs the noise"),
            "power with NaN": (("power", "--difference", "nan", "--spread", "1"), "--difference"),
            "transfer of one task": (("transfer", "--data", "embedded"), "two"),
            "planted with nonsense": (
                ("planted", "--patterns", "nope", "--model", "./no"), "patterns must be one of",
            ),
        },
        "command",
    ),
    Bad(
        name="output: a file",
        words=("study", "--output", "taken", *_RUNS),
        says="taken",
        files={"taken": b"mine"},
    ),
    Bad(
        name="output: below a file",
        words=("profile", "--output", "taken/inside", *_RUNS[:6]),
        says="taken",
        files={"taken": b"mine"},
    ),
    Bad(
        name="train: adapter folder holds something",
        words=("train", "--adapter", "mine", *_RUNS[:6], "--max-steps", "1"),
        says="is not empty",
        files={"mine/note": b"mine"},
    ),
    Bad(
        name="embedded build: a command of earlier versions",
        words=("embedded", "build", "mine", "--steps", "8"),
        says="python -m benchmarks.embedded_base FOLDER",
    ),
)  # fmt: skip
