"""A trained model is used: `serve.ask` (one shot), `serve.chat` (terminal), `serve` (server and web page).

Imports the model and its text, never the training engine.
"""
