package api

import "context"

// EachPage asks for a list page by page and hands on each; what there is between is never more than one. What is in the cluster during the
// whole of it is listed once; what comes or goes meanwhile may be there or not.
func EachPage(ctx context.Context, req *ListRequest, list func(context.Context, *ListRequest) (*Objects, error), f func(objects [][]byte) error) error {
	req.PageBytes = ListPageBytes
	for {
		page, err := list(ctx, req)
		if err != nil {
			return err
		}
		if err := f(page.GetJson()); err != nil || page.GetNext() == "" {
			return err
		}
		req.After = page.GetNext()
	}
}
