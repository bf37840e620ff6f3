//! Machine description in, plan out.

#![forbid(unsafe_code)]
