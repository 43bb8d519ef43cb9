"""The only owner of grpc and of sockets between daemons."""
