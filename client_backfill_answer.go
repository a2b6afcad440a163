package main

// This file decodes answers of the query API of Prometheus (web/api/v1 in its source) series by
// series, so that memory does not grow with the size of an answer. Memory is bounded by maxAPIValue.

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
)

const maxAPIValue = 32 << 20 // most bytes of a series or of another value in an answer of the query API

// apiSeries is one series of an answer of the query API. A native histogram has neither Values nor
// Value.
type apiSeries struct {
	Labels map[string]string `json:"metric"`
	Values []apiSample       `json:"values"` // of a range selector, in ascending order of time
	Value  *apiSample        `json:"value"`  // of an instant selector
}

// apiSample is a sample in an answer of the query API: [seconds since the epoch, "value"].
type apiSample struct {
	T int64 // ms since the epoch
	V float64
}

// UnmarshalJSON implements json.Unmarshaler. Its errors wrap errNoAPIAnswer.
func (s *apiSample) UnmarshalJSON(b []byte) error {
	var pair []json.RawMessage
	var value string
	if json.Unmarshal(b, &pair) != nil || len(pair) != 2 || json.Unmarshal(pair[1], &value) != nil {
		return fmt.Errorf("%w: %.60q is no sample", errNoAPIAnswer, b)
	}
	seconds, err := strconv.ParseFloat(string(pair[0]), 64)
	if err != nil || math.Abs(seconds) > MaxMoment/1000 {
		return fmt.Errorf("%w: %.40q is no time", errNoAPIAnswer, pair[0])
	}
	s.T = int64(math.Round(seconds * 1000))
	if s.V, err = strconv.ParseFloat(value, 64); err != nil {
		return fmt.Errorf("%w: %.40q is no value", errNoAPIAnswer, value)
	}
	return nil
}

// apiError is an answer of the query API that reports an error.
type apiError struct{ Type, Text string }

func (e *apiError) Error() string { return fmt.Sprintf("%.40s: %.300s", e.Type, e.Text) }

// errNoAPIAnswer is wrapped by the error for an answer that is not one of a query API.
var errNoAPIAnswer = errors.New("not an answer of the query API of Prometheus")

// decodeAPIAnswer decodes an answer of the query API, and calls emit for each series, also if the
// answer turns out to be faulty later. The error is an *apiError if the answer reports an error. It
// wraps errNoAPIAnswer if the body is no JSON, or JSON of another shape. It does not if the body ends
// early or cannot be read, because the next answer may be complete. An error of emit ends the decoding
// and is returned as it is.
func decodeAPIAnswer(body io.Reader, emit func(*apiSeries) error) error {
	values := &valueReader{r: body, left: maxAPIValue}
	d := apiDecoder{json.NewDecoder(values), values}
	status, failure, hasResult, isPartial := "", apiError{}, false, false
	err := d.eachField(func(name string) error {
		switch name {
		case "status":
			return d.decode(&status)
		case "errorType":
			return d.decode(&failure.Type)
		case "error":
			return d.decode(&failure.Text)
		case "isPartial": // of VictoriaMetrics
			return d.decode(&isPartial)
		case "data":
			return d.eachField(func(name string) error {
				if name != "result" {
					return d.decode(new(json.RawMessage))
				}
				hasResult = true
				return d.eachSeries(emit)
			})
		}
		return d.decode(new(json.RawMessage))
	})
	switch {
	case err != nil:
		return err
	case status == "error":
		return &failure
	case status != "success":
		return fmt.Errorf("%w: its status is %.40q", errNoAPIAnswer, status)
	case !hasResult:
		return fmt.Errorf("%w: it has no result", errNoAPIAnswer)
	case isPartial:
		return errors.New("the answer is partial, because a part of the source does not answer")
	}
	// The end of a compressed body has a checksum, and an HTTP connection is used again only if its body
	// was read to the end.
	if _, err := d.Token(); err != io.EOF {
		return cmp.Or(decodeError(err), fmt.Errorf("%w: it goes on after its end", errNoAPIAnswer))
	}
	return nil
}

// apiDecoder decodes an answer of the query API in steps.
type apiDecoder struct {
	*json.Decoder
	values *valueReader
}

// valueReader limits how much the decoder may read for one value.
type valueReader struct {
	r    io.Reader
	left int // bytes
}

// Read implements io.Reader.
func (v *valueReader) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	if v.left -= n; v.left < 0 {
		return 0, fmt.Errorf("%w: a value has more than %d bytes", errAnswerTooLarge, maxAPIValue)
	}
	return n, err
}

// eachSeries calls emit for each series of the array that comes next. As in other JSON of Go programs,
// null is an empty array.
func (d apiDecoder) eachSeries(emit func(*apiSeries) error) error {
	if isNull, err := d.begin('['); err != nil || isNull {
		return err
	}
	for d.More() {
		var s apiSeries
		if err := d.decode(&s); err != nil {
			return err
		}
		if s.Labels == nil {
			return fmt.Errorf("%w: a series has no labels", errNoAPIAnswer)
		}
		if err := emit(&s); err != nil {
			return err
		}
	}
	return d.end()
}

// eachField calls decode for each field of the object that comes next. The function decode must read
// the value of the field. An object that is null has no fields.
func (d apiDecoder) eachField(decode func(name string) error) error {
	if isNull, err := d.begin('{'); err != nil || isNull {
		return err
	}
	for d.More() {
		d.values.left = maxAPIValue
		token, err := d.Token()
		if err != nil {
			return decodeError(err)
		}
		name, _ := token.(string) // the decoder accepts only a string here
		if err := decode(name); err != nil {
			return err
		}
	}
	return d.end()
}

// begin reads the begin of an object or array, or null.
func (d apiDecoder) begin(want json.Delim) (isNull bool, err error) {
	token, err := d.Token()
	if err != nil {
		return false, decodeError(err)
	}
	if token != nil && token != want {
		return false, fmt.Errorf("%w: it has no %v where one must be", errNoAPIAnswer, want)
	}
	return token == nil, nil
}

// end reads the end of an object or array, of which nothing else is left.
func (d apiDecoder) end() error {
	_, err := d.Token()
	return decodeError(err)
}

func (d apiDecoder) decode(v any) error {
	d.values.left = maxAPIValue
	return decodeError(d.Decode(v))
}

// decodeError returns the error of decodeAPIAnswer for an error of package json or of the body.
func decodeError(err error) error {
	syntax, kind := new(json.SyntaxError), new(json.UnmarshalTypeError)
	switch {
	case err == nil, errors.Is(err, errNoAPIAnswer):
		return err
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	case errors.As(err, &syntax), errors.As(err, &kind):
		return fmt.Errorf("%w: %w", errNoAPIAnswer, err)
	}
	return fmt.Errorf("decoding the answer: %w", err)
}
