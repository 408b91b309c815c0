"""Settings of Sphinx, which builds the site from Markdown. `make docs` runs `scripts/docs.py`."""

project = "Forebay"
html_title = "Forebay"
extensions = ["myst_parser", "sphinx_copybutton"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["forebay.css"]
# The site names no writer, and needs no link to its own source files.
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
# Links to headings work as on code hosts, down to the third level.
myst_heading_anchors = 3
# Lines of a console begin with a prompt, which nobody wants to copy.
copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .gp, .go"
