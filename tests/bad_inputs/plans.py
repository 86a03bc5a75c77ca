"""Methods, importance profiles and addresses that are wrong."""

from __future__ import annotations

import json

from bad_inputs.case import Bad, in_file, spoken

_METHODS = {
    "empty": ("", "unknown method ''"),
    "a colon": (":", "unknown method ''"),
    "misspelt": ("unifrom", "did you mean 'uniform'"),
    "a name of Python": ("__class__", "unknown method"),
    "a path": ("../../uniform", "unknown method"),
    "markup": ("[red]uniform[/]", "[red]uniform[/]"),
    "an escape": ("\x1b[2Juniform", "\\x1b[2Juniform"),
    "an option without value": ("uniform:rank", "required option=value"),
    "an option twice": ("uniform:rank=8,rank=4", "is given twice"),
    "an unknown option": ("uniform:rnk=8", "unknown option of uniform 'rnk'"),
    "an option of Python": ("uniform:allocator=x", "unknown option of uniform"),
    "a rank of zero": ("uniform:rank=0", "rank must be at least 1"),
    "a negative rank": ("uniform:rank=-1", "rank must be at least 1"),
    "a rank of NaN": ("uniform:rank=nan", "rank: expected a whole number"),
    "a rank beyond floats": ("uniform:rank=1e999", "rank: expected a whole number"),
    "a rank beyond all models": ("uniform:rank=99999999999", "smaller side"),
    "a rank of 5,000 digits": ("uniform:rank=" + "9" * 5000, "rank: expected a whole number"),
    "a shell in a rank": ("uniform:rank=$(touch canary)", "rank: expected a whole number"),
    "a budget of zero": ("uniform:budget=0", "budget must be a whole number"),
    "a negative budget": ("uniform:budget=-7", "budget must be a whole number"),
    "a budget of uniform nothing": ("uniform:budget=uniform-", "budget must be a whole number"),
    "a budget in superscript": ("uniform:budget=²", "budget must be a whole number"),
    "a budget of 5,000 digits": ("uniform:budget=" + "9" * 5000, "budget must be"),
    "a budget too small": ("uniform:budget=3", "too small"),
    "an unknown placement": ("uniform:placement=head", "placement must be one of"),
    "an unknown target": ("uniform:target_names=../../x", "unknown target name"),
    "a control arm of itself": ("random:of=random", "random: of: unknown method"),
    "a control arm of nothing": ("random:of=nope", "random: of: unknown method"),
    "a threshold out of bounds": ("waterfill:abstain=-1", "abstain"),
    "multiples of zero": ("uniform:multiple=0", "multiple must be at least 1"),
    "limits that cross": ("uniform:min_rank=9,max_rank=3", "min_rank"),
    "an unknown metric": ("empirical:metric=nope", "metric"),
    "a profile that is lacking": ("empirical", "needs an importance profile"),
    "a profile for nothing": ("uniform:profiled_on=a.json", "follows no importance profile"),
    "two methods at once": ("uniform linear_decay", "unknown method"),
    "JSON": ('{"name": "uniform"}', "required option=value"),
    "a very long name": ("u" * 100_000, "unknown method"),
}

_SITES = [f"transformer.h.{layer}.{name}" for layer in range(3)
          for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
_GOOD = {
    "metric": "weight_gradient", "scores": dict.fromkeys(_SITES, 1.0), "spectra": None,
    "replicates": [], "tokens": 10, "processed_tokens": 10, "seconds": 1.0, "seed": 0,
    "stability": None, "stability_note": "",
}  # fmt: skip


def _profile(**changes: object) -> str:
    return json.dumps({**_GOOD, **changes})


def _score(value: object) -> str:
    return _profile(scores={**dict.fromkeys(_SITES, 1.0), _SITES[0]: value})


_PROFILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "not an importance profile"),
    "not JSON": ("hello", "not an importance profile"),
    "a list": ("[]", "not an importance profile"),
    "null": ("null", "not an importance profile"),
    "truncated": (_profile()[:-9], "not an importance profile"),
    "not UTF-8": (b"\xff", "cannot be read"),
    "nested without end": ('{"scores":' * 50_000, "not an importance profile"),
    "a score of NaN": (_score(float("nan")), "not an importance profile"),
    "a score of infinity": (_score(float("inf")), "not an importance profile"),
    "a negative score": (_score(-1.0), "negative"),
    "a score of text": (_score("many"), "not an importance profile"),
    "a score beyond floats": (_score(10**400), "not an importance profile"),
    "a score of null": (_score(None), "not an importance profile"),
    "all scores zero": (_profile(scores=dict.fromkeys(_SITES, 0.0)), "zero"),
    "missing sites": (_profile(scores={_SITES[0]: 1.0}), "no score"),
    "no sites": (_profile(scores={}), "no score"),
    "sites of another model": (_profile(scores={"model.layers.0.q": 1.0}), "no score"),
    "scores as a list": (_profile(scores=[1, 2]), "not an importance profile"),
    "another metric": (_profile(metric="heavy_tail"), "measured heavy_tail"),
    "no metric": (_profile(metric=None), "not an importance profile"),
    "spectra as text": (_profile(spectra="abc"), "not an importance profile"),
    "a spectrum of NaN": (_profile(spectra={_SITES[0]: [float("nan")]}), "not an importance"),
    "a count of text": (_profile(tokens="many"), "not an importance profile"),
    "a count beyond floats": (_profile(tokens=float("inf")), "not an importance profile"),
    "missing fields": (json.dumps({"scores": {}}), "not an importance profile"),
}

_REFERENCES = {
    "no such scheme": "nonsense:/adaptive-lora@champion",
    "a web address": "http://127.0.0.1:9/adapter",
    "a folder that is not there": "./nowhere",
    "a file": "good.json",
    "an empty folder": "empty",
    "a path upwards": "../../../../etc",
    "an escape": "\x1b[2Jadapter",
    "a NUL byte": "a\0b",
    "a very long name": "x" * 5000,
    "a dash": "-",
}
_URIS = (
    "models:/nope@champion", "models:/nope/1", "models:/", "models:/../../etc/1", "runs:/0/adapter",
    "models:/nope/latest/extra", "models:/m-00000000000000000000000000000000",
)  # fmt: skip

CASES: tuple[Bad, ...] = (
    *spoken(
        {
            name: (("plan", "--model", "BASE", f"--method={text}"), says)
            for name, (text, says) in _METHODS.items()
        },
        "method",
    ),
    *in_file(
        _PROFILES, "profile", "bad.json",
        "plan", "--model", "BASE", "--method", "empirical", "--profile", "bad.json",
    ),
    *(
        Bad(
            name=f"{words[0]}: {name}", words=(*words, "--", text, *more), says="adapter",
            files={"empty/note": b"nothing here"},
        )
        for name, text in _REFERENCES.items()
        for words, more in ((("export", "--uniform"), ("out",)),)
    ),
    *(
        Bad(name=f"export from no store: {uri}", words=("export", "--merged", uri, "out"),
            says="no tracking store")
        for uri in _URIS[:3]
    ),
    *spoken(
        {
            "a folder that is not there": (("plan", "--model", "./nowhere"), "does not exist"),
            "a folder without a model": (("plan", "--model", "."), "required config.json"),
            "a path upwards": (("plan", "--model", "../../nowhere"), "does not exist"),
            "a file": (("plan", "--model", "./good.json"), "good.json"),
            "a name of 5,000 signs": (("plan", "--model", "x" * 5_000), "too long for the name"),
            "a folder of 5,000 signs": (
                ("plan", "--model", f"./{'x' * 5_000}"), "too long for the name",
            ),
            "a profile of 5,000 signs": (
                ("plan", "--model", "BASE", "--method", "empirical", "--profile", "x" * 5_000),
                "name too long",
            ),
            "a URL with a password": (
                ("plan", "--model", "https://user:secret-word@example.org/m"), "***@example.org",
            ),
            "no hub id": (("plan", "--model", "a b c"), "neither a local folder nor reachable"),
            "an empty name": (("plan", "--model", ""), "required config.json"),
            "an escape": (("plan", "--model", "./\x1b[2J"), "\\x1b[2J"),
            "a profile that is not there": (
                ("plan", "--model", "BASE", "--profile", "nope.json"), "cannot be read",
            ),
            "a profile that is a folder": (
                ("plan", "--model", "BASE", "--profile", "."), "is a directory",
            ),
            "a device as profile": (
                ("plan", "--model", "BASE", "--profile", "/dev/zero"), "cannot be read",
            ),
            "alpha of zero": (("plan", "--model", "BASE", "--alpha", "0"), "alpha must be above 0"),
            "an earlier scale of zero": (
                ("plan", "--model", "BASE", "--scale", "0"), "alpha must be above 0; got 0"
            ),
        },
        "plan",
    ),
    *(
        Bad(name=f"model folder: {name}", words=("plan", "--model", "bad"), says=says,
            files={"bad/config.json": content.encode()})
        for name, (content, says) in {
            "empty configuration": ("", "cannot be read"),
            "a list as configuration": ("[]", "required a JSON object"),
            "no model type": ("{}", "cannot be used"),
            "an unknown model type": ('{"model_type": "nope"}', "cannot be used"),
            "a type of the wrong type": ('{"model_type": [1]}', "cannot be used"),
            "a negative width": (
                '{"model_type": "gpt2", "n_embd": -4, "n_head": 2}', "cannot be used",
            ),
            "a width of text": ('{"model_type": "gpt2", "n_embd": "wide"}', "cannot be used"),
            "no layers": ('{"model_type": "gpt2", "n_layer": 0}', "no adaptable site"),
            "nested without end": ('{"a":' * 50_000, "cannot be read"),
            "not JSON": ("{'model_type': 'gpt2'}", "cannot be read"),
            "code of its own": (
                '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}', "unless you say so",
            ),
            "compiled code": (
                '{"model_type": "gpt2", "attn_implementation": "a/b"}', "compiled code",
            ),
        }.items()
    ),
)  # fmt: skip

IN_A_STORE: dict[str, tuple[str, ...]] = {
    **{f"export {uri}": ("export", "--uniform", uri, "out") for uri in _URIS},
    "evaluate of no such version": ("evaluate", "--adapter", "models:/adaptive-lora/999"),
    "evaluate of no such alias": ("evaluate", "--adapter", "models:/adaptive-lora@nope"),
    "compare of no such study": ("compare", "--study-id", "nope"),
    "compare of a quoted study": ("compare", "--study-id", "x' or '1'='1"),
    "compare by a broken query": ("compare", "--query", "tags.data = "),
    "compare by an injected query": ("compare", "--query", "'; DROP TABLE runs; --"),
    "compare by a query of nothing": ("compare", "--query", "tags.data = 'nope'"),
    "compare into a name of 5,000 signs": ("compare", "--output", "x" * 5_000),
    "compare in a store of 5,000 signs": ("compare", "--tracking-uri", f"sqlite:///{'x' * 5_000}"),
    "sync of a name of 5,000 signs": ("sync", "x" * 5_000),
    "train to a name of 5,000 signs": ("train", "--adapter", "x" * 5_000),
    "evaluate of a name of 5,000 signs": ("evaluate", "--adapter", "x" * 5_000),
    "profile into a name of 5,000 signs": ("profile", "--output", "x" * 5_000),
    "compare with an unknown baseline": ("compare", "--baseline", "nope"),
    "compare with an unknown correction": ("compare", "--correction", "nope"),
    "compare with a margin of NaN": ("compare", "--margin", "nan"),
    "compare into a file": ("compare", "--output", "good.json"),
    "compare with a path as model": ("compare", "--registered-model", "../x"),
    "compare of no yes or no": ("compare", "--allow-mixed", "perhaps"),
    "power of no such study": ("power", "--study-id", "nope"),
}
"""Commands that are wrong beside a store with a finished study."""
