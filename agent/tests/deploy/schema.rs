//! docs/ebb.dev-v1.schema.json, which the trials of `tests/node` compare with what ebb prints.

use std::fs;

use ebb_protocol::schema;

use crate::manifest::{read, repository};

const DOCUMENT: &str = "docs/ebb.dev-v1.schema.json";

#[test]
fn the_published_schema_is_that_of_the_types() {
    let schema = serde_json::to_string_pretty(&schema::document()).unwrap() + "\n";
    if std::env::var_os("EBB_WRITE_DOCS").is_some() {
        fs::write(repository().join(DOCUMENT), &schema).unwrap();
    }
    assert!(
        read(DOCUMENT) == schema,
        "{DOCUMENT} is not up to date: write it with EBB_WRITE_DOCS=1 cargo test -p ebb --test deploy schema"
    );
}
