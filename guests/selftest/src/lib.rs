//! The self-test guest image.
