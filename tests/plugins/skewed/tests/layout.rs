//! The record tells the two tables apart, and says where they differ.

use abi_stable::StableAbi;
use abi_stable::abi_stability::check_layout_compatibility;

#[test]
fn the_records_differ_in_one_parameter() {
    let ours = <vmm_abi::device::IoTable as StableAbi>::LAYOUT;
    let theirs = <vmm_test_plugin_skewed::IoTable as StableAbi>::LAYOUT;
    check_layout_compatibility(ours, ours).expect("the same table");
    let error = check_layout_compatibility(ours, theirs)
        .expect_err("another table")
        .to_string();
    assert!(
        ["mismatched type", "param_2", "field_name:read"]
            .iter()
            .all(|part| error.contains(part)),
        "{error}"
    );
}
