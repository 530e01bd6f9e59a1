"""The whole road as steps with folders between them: what to do, what is done, what has to be done again."""
