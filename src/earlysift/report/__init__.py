"""From run folders to figures and one self-contained HTML page."""
