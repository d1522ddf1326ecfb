"""From the ledger of a study to results.csv, curves.csv and the screen: how well each attention learned its task."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from evals.results.formatting import align_columns, format_mean, format_setting, wrap
from evals.results.frames import swept_column
from evals.results.ledger import Record
from evals.results.schema import columns
from evals.results.training_runs import best_learning_rate
from evals.stats.intervals import mean_interval

COLUMNS = columns("accuracy")
CURVES = columns("curves")


def build(records: Sequence[Record]) -> pd.DataFrame:
    """One row an attention, setting, learning rate, length at which it was asked, and group of targets; group empty: of all.

    Of studies of the same settings the last counts. Numbers are means over seeds, with the interval over them; where a
    seed failed there are none, and outcome and detail say why.
    """
    rows = [row for study, name, runs in _studies(records) for row in _rows(study, name, runs)]
    extra = {column: None for row in rows for column in row if column not in COLUMNS}
    return pd.DataFrame(rows, columns=[*COLUMNS, *extra])


def build_curves(records: Sequence[Record]) -> pd.DataFrame:
    """The training loss of every run, a row a point: the mean of the steps since the point before."""
    rows = []
    columns: dict[str, None] = {}
    for study, name, runs in _studies(records):
        best = best_learning_rate(runs, study["learning_rates"])
        option = _option(study)
        columns |= dict.fromkeys(option)
        for run in runs:
            tokens = study["settings"]["batch_size"] * study["settings"]["seq_len"]
            told = {"sweep": study["sweep"], "swept": study["swept"], "attention": name, "learning_rate": run["learning_rate"]}
            told |= {"best": run["learning_rate"] == best, "seed": run["seed"], **option}
            rows += [told | {"step": step, "tokens": step * tokens, "loss_nats": loss} for step, loss in run.get("curve", [])]
    return pd.DataFrame(rows, columns=[*CURVES, *columns])


def _option(study: Record) -> dict[str, Any]:
    if study["swept"] is None:
        return {}
    key = str(study["swept"]).rpartition(".")[2]
    return {key: study["settings"][key]}


def _studies(records: Sequence[Record]) -> Iterator[tuple[Record, str, list[Record]]]:
    """Every attention of the studies that count, with its runs: the last of the same settings that came to any."""
    found: dict[tuple[str, str], Record] = {}
    lost = {record["study"]: record["detail"] for record in records if record.get("kind") == "lost" and "study" in record}
    made = {record["run"] for record in records if record.get("kind") == "run"}
    for record in records:
        if record.get("kind") == "lost" and "study" in record:  # perhaps before it could say what it is
            record = record["described"]
        if record.get("kind") == "study":
            for name in record["candidates"]:
                place = name, json.dumps(record["settings"], sort_keys=True)
                if place in found and record["runs"][name] not in made and record["study"] not in lost:
                    continue
                found.pop(place, None)  # so that the order is that of the last time
                found[place] = record
    for (name, _), study in found.items():
        key = study["runs"][name]
        runs = [record for record in records if record.get("kind") == "run" and record["run"] == key]
        # What was not trained at first may be certified since.
        runs = [run for run in runs if run["learning_rate"] is not None] or runs
        if not runs and study["study"] in lost:
            runs = [{"learning_rate": None, "seed": 0, "outcome": "lost", "detail": lost[study["study"]]}]
        if runs:
            yield study, name, runs


def _rows(study: Record, name: str, runs: Sequence[Record]) -> Iterator[dict[str, Any]]:
    best = best_learning_rate(runs, study["learning_rates"])
    for rate in dict.fromkeys(run["learning_rate"] for run in runs):
        own = [run for run in runs if run["learning_rate"] == rate]
        row = {
            **{key: study[key] for key in ("sweep", "swept", "study", "chance")},
            "attention": name,
            **study["settings"],
            "ff_dim": study["candidates"][name]["ff_dim"] or study["settings"].get("ff_dim"),
            "learning_rate": rate,
            "best": rate == best,
            "seeds": len(own),
            "outcome": "ok",
            "detail": "",
        }
        failed = [run for run in own if run["outcome"] != "ok"]
        if failed:
            seed = "" if rate is None else f"seed {failed[0]['seed']}: "
            yield row | {"outcome": failed[0]["outcome"], "detail": seed + failed[0]["detail"]}
            continue
        row |= {
            "validation_loss_nats": _mean(run["validation_loss"] for run in own),
            "train_s": _mean(run["train_s"] for run in own),
            **{column: own[0][column] for column in ("parameters", "tokens")},
        }
        for asked in zip(*(run["evaluations"] for run in own), strict=True):
            told = {"eval_seq_len": asked[0]["seq_len"], "state_bytes": asked[0]["state_bytes"]}
            groups = range(len(asked[0]["groups"]))
            yield row | told | _numbers(asked, groups, study)
            if study["grouped_by"] is not None:
                for group in groups:
                    if asked[0]["targets"][group]:
                        yield row | told | {study["grouped_by"]: asked[0]["groups"][group]} | _numbers(asked, [group], study)


def _mean(values: Iterator[float]) -> float:
    return mean_interval(list(values)).value


def _numbers(asked: Sequence[Record], groups: Sequence[int], study: Record) -> dict[str, Any]:
    """Accuracy and loss over these groups of targets, one value a seed."""
    sums = [{of: math.fsum(one[of][group] for group in groups) for of in ("targets", "right", "loss")} for one in asked]
    accuracy = mean_interval([one["right"] / one["targets"] for one in sums])
    loss = mean_interval([one["loss"] / one["targets"] for one in sums])
    row = {
        "targets": int(sums[0]["targets"]),
        "accuracy": accuracy.value,
        "accuracy_low": max(accuracy.low, 0.0),
        "accuracy_high": min(accuracy.high, 1.0),
        "loss_nats": loss.value,
        "loss_low_nats": loss.low,
        "loss_high_nats": loss.high,
    }
    if study["unit"] == "byte":
        bits = (loss.value, loss.low, loss.high)
        row |= dict(
            zip(("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high"), (one / math.log(2) for one in bits), strict=True)
        )
    return row


# --- on the screen ------------------------------------------------------------------------------


def render(table: pd.DataFrame) -> str:
    """At the best learning rates, over all targets: attentions down, and across where they were asked."""
    whole = table[table["depth"].isna() & table["position"].isna()]
    reported = whole[whole["best"] & (whole["outcome"] == "ok")]
    names = list(dict.fromkeys(table["attention"]))
    blocks, swept = [], swept_column(whole)
    if len(reported):
        across = swept if reported[swept].nunique() > 1 or reported["eval_seq_len"].nunique() == 1 else "eval_seq_len"
        if across == swept:  # at the length of training
            reported = reported[reported["eval_seq_len"] == reported.groupby(swept)["eval_seq_len"].transform("min")]
        quantity, title = "accuracy", "accuracy, higher is better"
        if reported["bits_per_byte"].notna().any():
            quantity, title = "bits_per_byte", "bits per byte, lower is better"
        places = sorted(reported[across].unique())
        cells = {(row["attention"], row[across]): row for _, row in reported.iterrows()}
        columns = [[format_setting(place), *(_cell(cells.get((name, place)), quantity) for name in names)] for place in places]
        columns.append(["rate", *(_rate(reported, name) for name in names)])
        blocks.append(f"{title}, by {across}\n" + align_columns([across, *names], columns))
        blocks.append(
            f"chance: {', '.join(f'{one:.3g}' for one in reported['chance'].unique())}; ±: half of the interval over seeds"
        )
    for _, row in whole[whole["outcome"] != "ok"].iterrows():
        rate = "" if pd.isna(row["learning_rate"]) else f" at learning rate {row['learning_rate']:g}"
        blocks.append(wrap(f"{row['attention']} at {swept}={row[swept]}{rate}: {row['outcome']}, {row['detail']}"))
    return "\n\n".join(blocks)


def _cell(row: "pd.Series[Any] | None", quantity: str) -> str:
    if row is None:
        return "–"
    return format_mean(row[quantity], row[f"{quantity}_low"], row[f"{quantity}_high"])


def _rate(reported: pd.DataFrame, name: str) -> str:
    rates = reported[reported["attention"] == name]["learning_rate"].unique()
    return ",".join(f"{rate:g}" for rate in rates) or "–"
