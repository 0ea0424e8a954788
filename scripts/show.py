"""Tables and coloured rows for the terminal."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.assemble import STATISTICS, read_rows
from data_prep.masks import Masked, pieces
from data_prep.prepare import Prepared
from data_prep.tokens import load_tokenizer
from recipes.schema import Recipe

SHOWN_OVERLAPS = 5


def data_table(prepared: Prepared) -> None:
    """What went in, what was dropped and why, what came out."""
    counts = prepared.counts
    table = Table(title=f"{prepared.folder}{' (unchanged, reused)' if prepared.reused else ''}", show_header=False)
    table.add_column("what")
    table.add_column("how many", justify="right")
    table.add_row("rows in", f"{counts['rows_in']:,}")
    for reason, number in counts["dropped"].items():
        table.add_row(f"  dropped: {reason}", f"{number:,} ({number / counts['rows_in']:.1%})")
    table.add_row("rows out", f"{counts['rows_out']:,}")
    table.add_row("training rows", f"{counts['train_rows']:,}")
    table.add_row("held-out rows", f"{counts['eval_rows']:,}")
    if counts["requests"]:
        table.add_row("requests for the teacher", f"{counts['requests']:,}")
    share = counts["trained_tokens"] / max(1, counts["train_tokens"])
    table.add_row("training tokens", f"{counts['train_tokens']:,}")
    table.add_row("  in the loss", f"{counts['trained_tokens']:,} ({share:.1%})")
    table.add_row("rows cut at their end", f"{counts['truncated_rows']:,} ({counts['lost_tokens']:,} tokens lost)")
    lengths = counts["length"]
    table.add_row("row length min / 50 % / 90 % / 99 % / max", " / ".join(f"{lengths[k]:,}" for k in lengths))
    for source in prepared.manifest["inputs"]:
        if unread := source.get("unread"):
            shown = ", ".join(unread[:5]) + (", ..." if len(unread) > 5 else "")
            table.add_row(f"files not read in {source['ref']}: {shown}", f"{len(unread):,}")
    console = Console()
    console.print(table)
    _overlaps(console, prepared)
    if counts["dropped"]:
        console.print(f"every dropped row is in {prepared.folder / 'dropped.jsonl'}", soft_wrap=True)
    console.print(f"retort data {prepared.folder.parent} draws it all on a page", soft_wrap=True)


def _overlaps(console: Console, prepared: Prepared) -> None:
    """Which held-out and benchmark items training rows overlapped with."""
    found = json.loads((prepared.folder / STATISTICS).read_text(encoding="utf-8")).get("overlaps")
    if not found or not found["items"]:
        return
    console.print(f"rows were dropped that overlap with {found['items']:,} held-out or benchmark items:")
    for line in found["most"][:SHOWN_OVERLAPS]:
        console.print(f"  {line['item']}: {line['rows']:,}", soft_wrap=True, highlight=False)
    if found["items"] > SHOWN_OVERLAPS:
        console.print(f"  and {found['items'] - SHOWN_OVERLAPS:,} more")


def masks(recipe: Recipe, prepared: Prepared, count: int) -> None:
    """Print rows with the trained tokens coloured (and in brackets, for terminals without colour)."""
    tokenizer = load_tokenizer(recipe.model)
    console = Console(highlight=False)
    for row in read_rows(prepared.folder, "train", count):
        console.rule(f"{row['_source']}  (row {row['_id']})")
        text = Text()
        for piece, trained in pieces(Masked(row["input_ids"], row["loss_mask"], ""), tokenizer.backend):
            text.append(f"[[{piece}]]" if trained else piece, style="bold green" if trained else "dim")
        console.print(text)
    console.print(Text("green, in [[ ]]: in the loss; grey: read, not trained", style="italic"))
