"""The model card of a bundle, made from its manifest, so that the two cannot disagree."""

from service.bundle import Conversion, Manifest, Origin

NOT_MEASURED = (
    "Not measured here. What the publishers report was measured with their code and their preprocessing, and may "
    "differ."
)


def render_model_card(manifest: Manifest) -> str:
    """Write the card as Markdown."""
    origin = manifest.origin
    made = _tell_conversion(origin) if isinstance(origin, Conversion) else _tell_training(origin)
    rows = {
        "Task": manifest.task,
        "Architecture": f"`{origin.architecture}`",
        "Data": origin.data,
        "Licence of the data": origin.data_license,
        "Licence of the weights": manifest.license,
        **made,
        **_tell_precision(manifest),
        "Program against module": _tell_parity(manifest),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# {manifest.name} {manifest.version}

{manifest.description}

| | |
|---|---|
{table}

## Measured quality

{_tell_quality(manifest)}

## Limits

{manifest.limits}
{_tell_notice(manifest)}"""


def _tell_training(origin: Origin) -> dict[str, str]:
    return {
        "Recipe": origin.recipe,
        "Command": f"`{origin.command}`",
        "Seed": str(origin.seed),
        "Training": f"{_tell_time(origin.minutes)}, {origin.hardware}",
    }


def _tell_time(minutes: float) -> str:
    return f"{minutes:.0f} minutes" if minutes >= 1 else f"{60 * minutes:.0f} seconds"


def _tell_conversion(origin: Conversion) -> dict[str, str]:
    return {
        "Weights": f"converted, not trained here; stored as they were published, from `{origin.file}`",
        "SHA-256 of that file": f"`{origin.sha256}`",
        "Configuration": f"`{origin.configuration}` of {origin.publisher}",
        "Command": f"`{origin.command}`",
    }


def _tell_precision(manifest: Manifest) -> dict[str, str]:
    if manifest.precision == "fp32":
        return {}
    return {"Precision of the program": "float16 in layers and attention; norms, sums, decisions and outputs float32"}


def _tell_notice(manifest: Manifest) -> str:
    return f"\n## Notice\n\n```\n{manifest.notice.strip()}\n```\n" if manifest.notice else ""


def _tell_parity(manifest: Manifest) -> str:
    parity = manifest.parity
    agreement = "max abs difference over max abs: " + ", ".join(
        f"{name} {error:.1e}" for name, error in parity.max_relative_error.items()
    )
    if parity.share_of_rows_off:
        shares = ", ".join(f"{name} {share:.2%}" for name, share in parity.share_of_rows_off.items())
        told = "; share of rows that differ by more, as near ties of hashes fell differently"
        if manifest.precision == "fp16":
            told = ", the module taking the program's decisions; share of rows 1e-2 apart where each takes its own"
        agreement += f"{told}: {shares}"
    return f"{agreement}; {parity.inputs}, batches of {parity.batch_sizes}"


def _tell_quality(manifest: Manifest) -> str:
    if not manifest.quality:
        return NOT_MEASURED
    rows = "\n".join(
        f"| {split} | {metric} | {value:.4f} |"
        for split, metrics in manifest.quality.items()
        for metric, value in metrics.items()
    )
    how = "rounded to float16" if manifest.precision == "fp32" else "rounded to float16, computed in float32"
    return f"""Measured with the shipped weights ({how}), single pass, through the service's own decoder.

| split | metric | value |
|---|---|---|
{rows}"""
