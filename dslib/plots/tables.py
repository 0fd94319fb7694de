"""Records laid out as tables: one row a network, a way or a record, columns with their units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..records import Record


def runs_table(runs: Sequence[Record]) -> pd.DataFrame:
    """Runs of `dslib run` on one network: the original, then what each made of it; index k."""

    def sizes(network: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "accuracy, %": 100 * network["accuracy"],
            "MACs, M": network["macs"] / 1e6,
            "parameters, M": network["parameters"] / 1e6,
        }

    first = runs[0].values
    rows = [{"k": len(first["found"]["m"]), **sizes(first["networks"]["original"]), "speed-up": 1.0}]
    for values in (run.values for run in runs):
        speed = values["speedup"]
        rows.append(
            {
                "k": values["k"],
                **sizes(values["networks"]["merged"]),
                "speed-up": speed["ratio_of_medians"],
                "its quartiles": f"{speed['q25']:.2f}-{speed['q75']:.2f}",
                "minutes, all stages": sum(values["seconds"].values()) / 60,
            }
        )
    return pd.DataFrame(rows).set_index("k").round(2).astype(object).where(lambda frame: frame.notna(), "")


def ablation_runs(records: Mapping[str, Record]) -> pd.DataFrame:
    """The rows of records of `dslib bench ablation`: mask -> record; one row a training, with its `mask`."""
    return pd.DataFrame([row | {"mask": mask} for mask, record in records.items() for row in record.values["rows"]])


def ablation_table(runs: pd.DataFrame, published: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """Accuracies in percent, ours over seeds and the paper's, of each mask and way to finetune.

    Args:
        runs: as from `ablation_runs`.
        published: the paper's accuracies in percent: index the mask, columns the ways.
        names: way -> what to call it.
    """
    ours = runs.groupby(["mask", "way"])[["before", "accuracy"]].agg(["mean", "std", "count"])
    table = {
        (mask, called): {
            "before, %": 100 * ours.loc[(mask, way), ("before", "mean")],
            "ours, %": 100 * ours.loc[(mask, way), ("accuracy", "mean")],
            "standard deviation": 100 * ours.loc[(mask, way), ("accuracy", "std")],
            "seeds": ours.loc[(mask, way), ("accuracy", "count")],
            "paper, %": published.loc[mask, way],
        }
        for mask in published.index
        for way, called in names.items()
    }
    return pd.DataFrame(table).T.rename_axis(["mask", "finetuned"]).round(2).astype({"seeds": int})


def borders_tables(records: Sequence[Record]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Records of `dslib bench merge-borders`: latencies, one row a network and border; and what merging took."""
    latencies, merges = {}, {}
    for record in records:
        config, values = record.config, record.values
        key = (config["model"], config["image_size"], config["batch_size"])
        merges[key] = {
            "sites": values["sites"],
            "seconds": " ".join(f"{seconds:.2f}" for seconds in values["merge_seconds"]),
            "peak memory, GiB": round(values["peak_memory_gib"], 1),
        }
        for name, network in values["networks"].items():
            quartiles = f"{network['q25']:.2f}-{network['q75']:.2f}"
            latencies[(*key, name)] = {"times the hoisted latency": network["times_hoisted"], "quartiles": quartiles}
    index = ["network", "image size", "batch"]
    return pd.DataFrame(latencies).T.rename_axis([*index, "border"]), pd.DataFrame(merges).T.rename_axis(index)


def exact_table(records: Mapping[int, Record]) -> pd.DataFrame:
    """Records of `dslib bench merge-exact`: image size -> record; how far merged networks are from unmerged ones."""
    rows = {}
    for size, record in records.items():
        for name, network in record.values["networks"].items():
            rows[size, name] = {
                "photos": record.values["images"],
                "other top-1": network["other_top1"],
                "largest difference / largest logit": f"{network['largest_relative_difference']:.0e}",
            }
    return pd.DataFrame(rows).T


def stored_timings(record: Record) -> pd.DataFrame:
    """The timings of a record of `dslib bench networks`; runtimes of a busy machine are told as such."""
    timings = pd.DataFrame(record.values["timings"])
    return timings.assign(runtime=timings["runtime"] + timings["busy"].map({True: " (busy)", False: ""}))


def lab_groups(record: Record) -> list[dict[str, Any]]:
    """What the browser's lab shows of a record of `dslib bench networks`: bars of each runtime."""
    rows = stored_timings(record).rename(columns={"network": "name", "q25": "low", "q75": "high"})
    rows["name"] = rows["name"].replace("dense counterpart", "dense")
    return [
        {
            "place": f"{record.machine['processor']}, {runtime}, recorded",
            "bars": part[["name", "ms", "speedup", "low", "high"]].to_dict("records"),
        }
        for runtime, part in rows.groupby("runtime", sort=False)
    ]


def machines_table(records: Mapping[str, Record]) -> pd.DataFrame:
    """The machines on which records were made, and how many on each."""
    columns = ["processor", "device", "threads", "torch", "Python"]
    machines = Counter(
        (m["processor"], m.get("device", "cpu"), m.get("threads") or "", m["torch"], m["python"])
        for m in (record.machine for record in records.values())
    )
    return pd.DataFrame([(*machine, count) for machine, count in machines.items()], columns=[*columns, "records"])


def records_table(records: Mapping[str, Record]) -> pd.DataFrame:
    """Of each record (file name -> record): by what, when and by which code it was made, its rows, how many busy."""

    def line(record: Record) -> dict[str, Any]:
        rows = [*record.values.get("rows", []), *record.values.get("timings", [])]
        busy = sum(bool(row.get("busy") or row.get("timing_busy")) for row in rows if isinstance(row, dict))
        others = {"run": "dslib run", "pages": "tests/browser/record_pages.py"}
        return {
            "made by": others.get(record.name, f"dslib bench {record.name}"),
            "date": record.date[:10],
            "commit": record.commit,
            "rows": len(rows) or "",
            "busy": busy or "",
        }

    return pd.DataFrame({name: line(record) for name, record in records.items()}).T


def speedup_table(record: Record) -> pd.DataFrame:
    """A record of `dslib bench speedup`: one row a network that was calibrated to a speed, and its speed-ups."""
    rows = {}
    for name, network in record.values["networks"].items():
        timings = {f"times as fast, {runtime}": timed["speedup"] for runtime, timed in network["timing"].items()}
        timings["times as fast, best of both"] = network["speedup_best_runtimes"]
        known = {"accuracy, %": round(100 * network["accuracy"], 1), "removed": str(len(network["removed"]))}
        rows[name] = known | {column: round(value, 2) for column, value in timings.items()}
    return pd.DataFrame(rows).T


def starts_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows of a record of `dslib bench starts`: accuracies over seeds for each mask, minutes and start."""
    whole = runs.groupby(["mask", "minutes", "start"], sort=False)
    columns = {
        "before, %": 100 * whole["accuracy_before"].mean(),
        "accuracy, % (mean)": 100 * whole["accuracy"].mean(),
        "(least)": 100 * whole["accuracy"].min(),
        "(most)": 100 * whole["accuracy"].max(),
        "minutes it took (mean)": whole["seconds"].mean() / 60,
        "seeds": whole.size(),
    }
    return pd.DataFrame(columns).round(1)


def expansion_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a record of `dslib bench expand`: epochs, minutes and accuracies over seeds of each way to train."""
    grouped = rows[rows["seed"].notna()].groupby("way")
    columns = {
        "epochs": grouped["epochs"].first().astype(int),
        "minutes": grouped["seconds"].mean() / 60,
        "accuracy, % (mean)": 100 * grouped["accuracy"].mean(),
        "standard deviation": 100 * grouped["accuracy"].std(),
        "seeds": grouped.size(),
    }
    return pd.DataFrame(columns).round(2)
