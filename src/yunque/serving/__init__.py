"""The server's room: engines that batch requests, the models they serve and the HTTP application over them."""
