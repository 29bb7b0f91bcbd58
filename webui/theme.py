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
#serving a { color: inherit; text-decoration: none; }
.dot { display: inline-block; width: 0.6em; height: 0.6em; border-radius: 50%; margin-right: 0.2em; }
.dot.ready { background: #10b981; }
.dot.empty { background: #f59e0b; }
.dot.away { background: #ef4444; }
/* The conversation scrolls within its box, so that the question stays in sight; Gradio's page would grow instead. */
.gradio-container { height: 100dvh; overflow-y: auto !important; }
.gradio-container > .main, .sidebar-parent, .sidebar-parent > main, .sidebar-parent > main > .column { min-height: 0; }
#chat { flex: 1 1 0 !important; min-height: 8rem !important; overflow: hidden !important; }
#chat > .wrapper { min-height: 0; }
#chat .bubble-wrap { height: 100%; }
#chat .placeholder-content { padding-top: 18vh; }
#chat .placeholder { text-align: center; }
#chat .message { line-height: 1.55; }
#new { font-weight: 500; }
#question { border: 1px solid var(--border-color-primary); border-radius: var(--radius-xl); padding: 0.35rem 0.5rem;
  background: var(--input-background-fill); }
#question:focus-within { border-color: var(--primary-500); }
#question textarea { border: none; box-shadow: none; }
#question .submit-button, #question .stop-button { background: var(--primary-600); color: white; }
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
