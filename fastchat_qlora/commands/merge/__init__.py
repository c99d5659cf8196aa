"""An adapter and its base model -> one plain model, verified.

Start with command.merge."""
