//! Cases as one line of text.

use crate::case::{Case, Outcome};
/// Prints.
pub fn print(case: &Case, _outcome: Option<&Outcome>, _memory: &[u8]) -> String {
    format!("{:x?}", case)
}
