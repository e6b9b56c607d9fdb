"""The sliders: a prompt whose tokens drop as choices are moved, in a notebook or as a page without code.

`state` is what is shown, as a plain object; `widgets` are a thin layer over it, `live_html` their text, `export` the
view as files, `app` the source on a real model and the served page.
"""
