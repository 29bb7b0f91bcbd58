"""Looks: system fonts only, because the page must work on machines without a network."""

from __future__ import annotations

from gradio.themes import Base, colors, sizes

CSS = """
footer { display: none !important; }
#title h1 { margin: 0; font-size: 1.35rem; letter-spacing: -0.01em; }
#title p { margin: 0; color: var(--body-text-color-subdued); font-size: var(--text-sm); }
#serving { font-size: var(--text-sm); }
#serving p { margin: 0; }
#speed { min-height: 1.5rem; padding: 0 0.25rem; color: var(--body-text-color-subdued); font-size: var(--text-sm); }
#speed p { margin: 0; }
#chat { border: none; }
#chat .message { line-height: 1.55; }
.sampling .form { gap: 0.25rem; }
"""


def make_theme() -> Base:
    return Base(
        primary_hue=colors.emerald,
        secondary_hue=colors.emerald,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_lg,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_border_width="1px",
        block_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
    )
