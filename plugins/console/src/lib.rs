//! Character backends: unix socket, terminal, pty, file.
