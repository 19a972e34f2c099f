"""The model card of a bundle, made from its manifest, so that the two cannot disagree."""

from service.bundle import Manifest


def render_model_card(manifest: Manifest) -> str:
    """Write the card as Markdown."""
    origin, parity = manifest.origin, manifest.parity
    quality = "\n".join(
        f"| {split} | {metric} | {value:.4f} |"
        for split, metrics in manifest.quality.items()
        for metric, value in metrics.items()
    )
    agreement = "max abs difference over max abs: " + ", ".join(
        f"{name} {error:.1e}" for name, error in parity.max_relative_error.items()
    )
    if parity.share_of_rows_off:
        shares = ", ".join(f"{name} {share:.2%}" for name, share in parity.share_of_rows_off.items())
        agreement += f"; share of rows that differ by more, as near ties of hashes fell differently: {shares}"
    return f"""# {manifest.name} {manifest.version}

{manifest.description}

| | |
|---|---|
| Task | {manifest.task} |
| Architecture | `{origin.architecture}` |
| Data | {origin.data} |
| Licence of the data | {origin.data_license} |
| Licence of the weights | {manifest.license} |
| Recipe | {origin.recipe} |
| Command | `{origin.command}` |
| Seed | {origin.seed} |
| Training | {origin.minutes:.0f} minutes, {origin.hardware} |
| Program against module | {agreement}; {parity.inputs}, batches of {parity.batch_sizes} |

## Measured quality

Measured with the shipped weights (rounded to float16), single pass, through the service's own decoder.

| split | metric | value |
|---|---|---|
{quality}

## Limits

{manifest.limits}
"""
