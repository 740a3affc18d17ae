"""The terminal view of a run: a snapshot comes in, cells go out.

`drawings` turn a scene into rows of styled text and know neither Textual nor the store; `widgets` and `screens` put
those rows on a terminal and listen to keys; `archive` is the one module that asks the store.
"""
