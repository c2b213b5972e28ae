"""Run folders of a comparison -> figures and one self-contained HTML page."""
