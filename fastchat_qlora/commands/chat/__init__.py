"""An adapter and questions -> answers, in a terminal or from a pipe.

Start with command.chat."""
