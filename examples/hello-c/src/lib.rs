//! Nothing: the plugin is C, see ../hello.c.
